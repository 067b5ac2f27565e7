"""Tiny random pipelines of flow-matching families on disk, with the published pipelines' parts and settings.

`make_flow(folder, kind)`, kind one of FLOWS: "sd3" and "sd3-no-t5" (Stable Diffusion 3), "sd35" (3.5 medium: normalised
queries and keys, a second attention in the first block), "flux-dev" (embeds the guidance, shifts by the image's size) and
"flux-schnell" (neither). VAE factor 4, latents of 4 channels; float32, at most 2 MB each.

Every parameter is random, also those that are born as zeros or ones, so that no path of a model stays shut; linear
layers and embeddings of tokens keep a sd of 1, so that time and caption tell predictions apart.
"""

from __future__ import annotations

import functools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.help.pipelines import clip_encoder, clip_tokenizer, write

SIZE = 64  # pixels
CHANNELS = 4  # of latents
END_OF_TEXT = "<|endoftext|>"


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


# --- parts ----------------------------------------------------------------------------------------------------------


def fill(model: nn.Module) -> Any:
    """The model in evaluation mode, with constant parameters moved off their constant and weights that keep a sd of 1."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.numel() > 1 and (parameter == parameter.flatten()[0]).all():
                parameter += 0.1 * torch.randn_like(parameter)
        for layer in model.modules():
            if isinstance(layer, nn.Linear):
                layer.weight.normal_(0, layer.in_features**-0.5)
        if hasattr(model, "get_input_embeddings"):
            model.get_input_embeddings().weight.normal_()
    return model.eval()


def normalise(encode: Any, last: nn.Module, mean: torch.Tensor, sd: torch.Tensor) -> None:
    """Scales `last`, the encoder's last convolution, until latents of drawn images have this mean and sd [channels].

    encode: of images [64, 3, 64, 64] in -1..1, gives moments [64, 2 * channels, ...]. The posterior's sd becomes about
    a third of `sd`.
    """
    from tests.help.worlds import draw

    images = np.stack([np.asarray(draw(np.random.default_rng(i), i < 32, (SIZE, SIZE))) for i in range(64)])
    with torch.no_grad():
        moments = encode(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1)
        latents = moments.transpose(0, 1).flatten(1)[: len(mean)]
        gain = sd / latents.std(1)
        spread = (slice(None), *[None] * (last.weight.ndim - 1))
        last.weight[: len(mean)] *= gain[spread]
        last.bias[: len(mean)] = (last.bias[: len(mean)] - latents.mean(1)) * gain + mean
        last.weight[len(mean) :] *= 0.1
        last.bias[len(mean) :] = 2 * sd.log() - 2


def _vae(scaling_factor: float, shift_factor: float):
    """An AutoencoderKL as SD 3 and FLUX.1 have it, whose shifted and scaled latents have mean 0 and sd 1."""
    from diffusers import AutoencoderKL

    vae = AutoencoderKL(
        **_blocks(),
        latent_channels=CHANNELS,
        scaling_factor=scaling_factor,
        shift_factor=shift_factor,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=True,
    )
    each = torch.ones(CHANNELS)
    normalise(fill(vae).encoder, vae.encoder.conv_out, shift_factor * each, each / scaling_factor)
    return vae


def _blocks() -> dict[str, Any]:
    """Three levels of a VAE of diffusers: factor 4."""
    return {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownEncoderBlock2D",) * 3,
        "up_block_types": ("UpDecoderBlock2D",) * 3,
        "layers_per_block": 1,
        "norm_num_groups": 4,
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
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
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


FLOWS = {
    "sd3": _build_sd3,
    "sd3-no-t5": _build_sd3,
    "sd35": _build_sd3,
    "flux-dev": _build_flux,
    "flux-schnell": _build_flux,
}
