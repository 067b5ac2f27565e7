"""Tiny random pipelines of flow-matching families on disk, with the published pipelines' parts and settings.

`make_flow(folder, kind)`, kind one of FLOWS: "sd3" and "sd3-no-t5" (Stable Diffusion 3), "sd35" (3.5 medium: normalised
queries and keys, a second attention in the first block), "flux-dev" (embeds the guidance, shifts by the image's size) and
"flux-schnell" (neither), "flux2-klein" (distilled) and "flux2-klein-base", "qwen-image". VAE factor 4, latents of 4
channels; float32, at most 2 MB each.

Every parameter is random, also those that are born as zeros or ones, so that no path of a model stays shut; linear
layers and embeddings of tokens keep a sd of 1, so that time and caption tell predictions apart.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from torch import nn

from tests.help.pipelines import bpe_tokenizer, clip_encoder, clip_tokenizer, write

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SIZE = 64  # pixels
CHANNELS = 4  # of latents
END_OF_TEXT = "<|endoftext|>"
LEADING = (
    "the image by detailing color shape size texture quantity text spatial relationships of objects and background"
)
VISION = {
    "vision_start": "<|vision_start|>",
    "vision_end": "<|vision_end|>",
    "image": "<|image_pad|>",
    "video": "<|video_pad|>",
}
CHAT = (  # one turn and no thinking, as Qwen3 writes it
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)


def make_flow(folder: str | Path, kind: str = "sd3", seed: int = 0) -> Path:
    """Writes a tiny random pipeline of a kind in FLOWS to `folder` and returns it (built once per process)."""
    return write(FLOWS[kind], folder, kind, seed)


# --- Stable Diffusion 3 ---------------------------------------------------------------------------------------------


def _build_sd3(kind: str):
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    medium = kind == "sd35"
    transformer = SD3Transformer2DModel(
        sample_size=SIZE // 4,
        patch_size=2,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=64,
        caption_projection_dim=32,
        pooled_projection_dim=32 + 24,
        pos_embed_max_size=24,
        dual_attention_layers=(0,) if medium else (),
        qk_norm="rms_norm" if medium else None,
    )
    t5 = kind != "sd3-no-t5"
    return StableDiffusion3Pipeline(
        transformer=fill(transformer),
        vae=_vae(scaling_factor=1.5305, shift_factor=0.0609),
        text_encoder=fill(clip_encoder(32, "quick_gelu", projection=32)),
        text_encoder_2=fill(clip_encoder(16, "gelu", projection=24)),
        text_encoder_3=_t5_encoder(64) if t5 else None,
        tokenizer=clip_tokenizer(END_OF_TEXT),
        tokenizer_2=clip_tokenizer("!"),
        tokenizer_3=_t5_tokenizer() if t5 else None,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0),
    )


# --- FLUX.1 ---------------------------------------------------------------------------------------------------------


def _build_flux(kind: str):
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    dev = kind == "flux-dev"
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=40,
        pooled_projection_dim=32,
        guidance_embeds=dev,
        axes_dims_rope=(4, 6, 6),
    )
    return FluxPipeline(
        transformer=fill(transformer),
        vae=_vae(scaling_factor=0.3611, shift_factor=0.1159),
        text_encoder=fill(clip_encoder(32, "quick_gelu")),
        text_encoder_2=_t5_encoder(40),
        tokenizer=clip_tokenizer(END_OF_TEXT),
        tokenizer_2=_t5_tokenizer(),
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000,
            shift=3.0 if dev else 1.0,
            use_dynamic_shifting=dev,
            base_shift=0.5,
            max_shift=1.15,
            base_image_seq_len=256,
            max_image_seq_len=4096,
        ),
    )


# --- FLUX.2 klein ---------------------------------------------------------------------------------------------------


def _build_klein(kind: str):
    from diffusers import FlowMatchEulerDiscreteScheduler, Flux2KleinPipeline, Flux2Transformer2DModel
    from transformers import Qwen2TokenizerFast, Qwen3Config, Qwen3ForCausalLM

    tokenizer = _qwen_tokenizer(Qwen2TokenizerFast)
    layers = 28  # the pipeline reads hidden states 9, 18 and 27
    encoder = Qwen3Config(**_qwen_text(tokenizer), num_hidden_layers=layers, head_dim=8, tie_word_embeddings=True)
    transformer = Flux2Transformer2DModel(
        in_channels=4 * CHANNELS,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=3 * 16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        transformer=fill(transformer),
        vae=_vae_flux2(),
        text_encoder=fill(Qwen3ForCausalLM(encoder)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=3.0, use_dynamic_shifting=True),
        is_distilled=kind == "flux2-klein",
    )


# --- Qwen-Image -----------------------------------------------------------------------------------------------------


def _build_qwen(kind: str):
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

    tokenizer = _qwen_tokenizer(Qwen2Tokenizer)
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2]}
    encoder = Qwen2_5_VLConfig(
        text_config=_qwen_text(tokenizer) | {"num_hidden_layers": 2, "rope_scaling": rope},
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16},
        **{f"{name}_token_id": tokenizer.convert_tokens_to_ids(token) for name, token in VISION.items()},
    )
    transformer = QwenImageTransformer2DModel(
        patch_size=2,
        in_channels=4 * CHANNELS,
        out_channels=CHANNELS,
        num_layers=2,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        guidance_embeds=False,
        axes_dims_rope=(4, 6, 6),
    )
    return QwenImagePipeline(
        transformer=fill(transformer),
        vae=_vae_qwen(),
        text_encoder=fill(Qwen2_5_VLForConditionalGeneration(encoder)),
        tokenizer=tokenizer,
        scheduler=FlowMatchEulerDiscreteScheduler(
            num_train_timesteps=1000,
            shift=1.0,
            shift_terminal=0.02,
            use_dynamic_shifting=True,
            base_shift=0.5,
            max_shift=0.9,
            base_image_seq_len=256,
            max_image_seq_len=8192,
        ),
    )


# --- parts ----------------------------------------------------------------------------------------------------------


def fill(model: nn.Module) -> Any:
    """The model in evaluation mode, with constant parameters moved off their constant and weights that keep a sd of 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                parameter += 0.1 * torch.randn_like(parameter)
            if name.endswith(("norm_q.weight", "norm_added_q.weight")):
                parameter *= 3  # attention that picks: a caption is a few tokens of many
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, layer.in_features**-0.5)
        if hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().weight.normal_()
    return model.eval()


def normalise(vae: Any, mean: torch.Tensor, sd: torch.Tensor) -> None:
    """Scales the encoder's last convolution until latents of drawn images have this mean and sd, float32 [channels].

    The posterior's sd becomes about a third of `sd`.
    """
    from tests.help.worlds import draw

    images = np.stack([np.asarray(draw(np.random.default_rng(i), i < 32, (SIZE, SIZE))) for i in range(64)])
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1
    last = vae.quant_conv or vae.encoder.conv_out
    video = last.weight.ndim == 5
    with torch.no_grad():
        moments = vae.encode(pixels[:, :, None] if video else pixels).latent_dist.parameters
        latents = moments.transpose(0, 1).flatten(1)[: len(mean)]
        gain = sd / latents.std(1)
        last.weight[: len(mean)] *= gain.view(-1, *[1] * (last.weight.ndim - 1))
        last.bias[: len(mean)] = (last.bias[: len(mean)] - latents.mean(1)) * gain + mean
        last.weight[len(mean) :] *= 0.1
        last.bias[len(mean) :] = 2 * sd.log() - 2


def _statistics() -> tuple[torch.Tensor, torch.Tensor]:
    """A mean and a sd for each channel of latents, all different."""
    return torch.randn(CHANNELS), torch.linspace(1.2, 3, CHANNELS)


def _vae(scaling_factor: float, shift_factor: float):
    """An AutoencoderKL as SD 3 and FLUX.1 have it, whose shifted and scaled latents have mean 0 and sd 1."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        **_blocks(),
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    each = torch.ones(CHANNELS)
    normalise(fill(vae), shift_factor * each, each / scaling_factor)
    return vae


def _vae_flux2():
    """FLUX.2's VAE; its batch norm knows the latents, but for a little that differs from place to place in a patch."""
    from diffusers import AutoencoderKLFlux2

    vae = fill(AutoencoderKLFlux2(**_blocks()))
    mean, sd = _statistics()
    normalise(vae, mean, sd)
    with torch.no_grad():
        vae.bn.running_mean.copy_(mean.repeat_interleave(4)).add_(torch.randn(4 * CHANNELS), alpha=0.2)
        vae.bn.running_var.copy_(sd.repeat_interleave(4) ** 2).mul_(torch.linspace(0.8, 1.2, 4 * CHANNELS))
    return vae


def _vae_qwen():
    """Qwen-Image's VAE of videos, whose latents have the mean and sd that its config says."""
    from diffusers import AutoencoderKLQwenImage

    mean, sd = _statistics()
    vae = AutoencoderKLQwenImage(
        base_dim=8,
        z_dim=CHANNELS,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=mean.tolist(),
        latents_std=sd.tolist(),
    )
    normalise(fill(vae), mean, sd)
    return vae


def _blocks() -> dict[str, Any]:
    """Three levels of a VAE of diffusers: factor 4."""
    return {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "latent_channels": CHANNELS,
        "sample_size": SIZE,
    }


# --- text -----------------------------------------------------------------------------------------------------------


def _t5_encoder(width: int):
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(_t5_tokenizer()),
        d_model=width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=2,
        feed_forward_proj="gated-gelu",
        tie_word_embeddings=False,
    )
    return fill(T5EncoderModel(config))


@functools.cache
def _t5_tokenizer():
    """A T5 tokenizer whose pieces are the characters of Latin-1; any other character is <unk>."""
    from transformers import T5TokenizerFast

    characters = [chr(i) for i in (*range(33, 127), *range(161, 256))]
    pieces = ["<pad>", "</s>", "<unk>", "▁", *characters]
    tokenizer = Tokenizer(models.Unigram([(piece, -2.0) for piece in pieces], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()])
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    config = {
        "tokenizer_class": "T5Tokenizer",
        "model_max_length": 512,
        "extra_ids": 0,
        "pad_token": "<pad>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
    }
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(str(Path(folder) / "tokenizer.json"))
        (Path(folder) / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
        return T5TokenizerFast.from_pretrained(folder)


def _qwen_text(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """What the configs of both text models of Qwen share."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "bos_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"),
    }


def _qwen_tokenizer(kind: type[PreTrainedTokenizerBase]) -> PreTrainedTokenizerBase:
    """Bytes, and as one token each what leads Qwen-Image's prompts: these are to be 34 tokens before the caption."""
    words = ["Describe", "system", "user", "assistant", *("Ġ" + word for word in LEADING.split())]
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = [END_OF_TEXT, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    tokenizer = bpe_tokenizer(kind, vocabulary, merges, model_max_length=2048, pad_token=END_OF_TEXT)
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", *VISION.values()], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = CHAT
    return tokenizer


FLOWS = {
    "sd3": _build_sd3,
    "sd3-no-t5": _build_sd3,
    "sd35": _build_sd3,
    "flux-dev": _build_flux,
    "flux-schnell": _build_flux,
    "flux2-klein": _build_klein,
    "flux2-klein-base": _build_klein,
    "qwen-image": _build_qwen,
}

# one of each family that is trained: what the parametrised tests of runs go through
TRAINED = ("sd35", "flux-dev", "flux2-klein-base", "qwen-image")
SMALL = ("--resolution", "32", "--text-tokens", "64")  # of a run on one of them: the pairs' own size, short captions
