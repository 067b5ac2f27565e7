"""Qwen-Image: rectified flow, one language model as its text encoder, captions of any length behind a mask.

Qwen team 2025, arXiv 2508.02324.

A caption is encoded alone and without padding, so its states are the same bits in any company, those that its pipeline has
for it alone. The denoiser then gets every caption at one length, `Model.text_tokens`: zeros fill it up, which the mask
hides from the attention. So the shapes of a step, and with them the last bits of a pair, do not depend on the captions
beside it either.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.models.checks import DEFAULTED, Configs, absent, equal, number
from dpo.models.family import JOINT_ATTENTION, Family, Flow, Geometry, Model, TextEncoding, Vae
from dpo.models.flux import PACK, as_latents, as_tokens, turns_match
from dpo.models.text import QWEN_TOKENIZER, beside
from dpo.settings.families import PIPELINES

# The published prompt, of which the states of the tokens before the caption are dropped. The pipeline lets no more than
# LONGEST tokens through behind them, whatever the denoiser is given.
TEMPLATE = (
    "<|im_start|>system\nDescribe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
)
DROPPED = 34
LONGEST = 1024

NATIVE = 128  # latents of a side, the pipeline's own: the transformer's config has none


def encode(model: Model, captions: list[str]) -> TextEncoding:
    """B captions -> the last hidden states [B, S, D] and the mask [B, S] of those that are the caption's.

    Each caption goes through the encoder by itself, which at these lengths waits for its weights, not for arithmetic.
    """
    tokens = model.text_tokens
    assert tokens is not None, "of a flow"
    states = [_states(model, caption)[:tokens] for caption in captions]
    hidden = states[0].new_zeros(len(captions), tokens, states[0].shape[-1])
    mask = torch.zeros(len(captions), tokens, dtype=torch.bool, device=hidden.device)
    for i, found in enumerate(states):
        hidden[i, : len(found)] = found
        mask[i, : len(found)] = True
    return TextEncoding(hidden, mask=mask)


@torch.no_grad()
def _states(model: Model, caption: str) -> Tensor:
    """The states [S, D] of one caption and of what the template has behind it."""
    tokenizer, encoder = model.tokenizers[0], model.text_encoders[0]
    prompt = [TEMPLATE.format(caption)]
    encoded = tokenizer(prompt, max_length=DROPPED + LONGEST, truncation=True, return_tensors="pt")
    language: Any = encoder.model  # without the head, which would give a number for every word that there is
    return language(input_ids=beside(encoder, encoded.input_ids), use_cache=False).last_hidden_state[0, DROPPED:]


def blank(model: Model) -> TextEncoding:
    """See `family.Flow`."""
    width, tokens = model.denoiser.config["joint_attention_dim"], model.text_tokens
    assert tokens is not None, "of a flow"
    mask = torch.empty(1, tokens, dtype=torch.bool, device="meta")
    return TextEncoding(torch.empty(1, tokens, width, device="meta"), mask=mask)


def predict(module: nn.Module, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
    """See `family.Denoise`; `sizes` is not used."""
    squares = F.pixel_unshuffle(x_t, PACK)
    height, width = squares.shape[2:]
    found = module(
        hidden_states=as_tokens(squares),
        timestep=t / 1000,
        encoder_hidden_states=text.hidden,
        encoder_hidden_states_mask=text.mask,
        img_shapes=[[(1, height, width)]] * len(x_t),
        return_dict=False,
    )[0]
    return F.pixel_shuffle(as_latents(found, height, width), PACK)


def posterior(vae: Vae, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """See `family.posterior`. The VAE is one of videos: an image is its first frame."""
    found = vae.encode(pixels[:, :, None]).latent_dist
    return found.mean[:, :, 0], found.std[:, :, 0]


def decode(vae: Vae, latents: Tensor) -> Tensor:
    """See `family.decode`."""
    return vae.decode(latents[:, :, None], return_dict=False)[0][:, :, 0]


def scaling(vae: Vae) -> tuple[list[float], list[float]]:
    """See `family.scaling`."""
    return list(vae.config["latents_mean"]), [1 / std for std in vae.config["latents_std"]]


def geometry(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Of a transformer whose tokens are squares of latents."""
    scale = 2 ** len(vae["temperal_downsample"])
    return Geometry(vae["z_dim"], scale, scale * PACK, NATIVE * scale)


def latents_fit(configs: Configs) -> str | None:
    """A check that the transformer's tokens are squares of the VAE's latents."""
    transformer, channels = configs["transformer"], configs["vae"]["z_dim"]
    given = (transformer.get("out_channels") or transformer["in_channels"]) * PACK**2
    if transformer["in_channels"] == given == channels * PACK**2:
        return None
    return (
        f"the transformer takes tokens of {transformer['in_channels']} numbers and gives {given}, but two by two latents of "
        f"the VAE are {channels * PACK**2}: they are of different models"
    )


def scaling_fits(configs: Configs) -> str | None:
    """A check that the VAE's config has a mean and a spread above 0 for each channel of its latents."""
    vae = configs["vae"]
    for key in ("latents_mean", "latents_std"):
        values = None if key in vae.get(DEFAULTED, ()) else vae[key]  # the class's own would be taken in silence
        given = values if isinstance(values, (list, tuple)) else ()
        numbers = all(type(value) in (int, float) for value in given)
        if not numbers or len(given) != vae["z_dim"] or (key == "latents_std" and min(given) <= 0):
            above = " above 0" if key == "latents_std" else ""
            return (
                f"the vae's config has no {key} with {vae['z_dim']} numbers{above}, one for each channel of its latents"
            )
    return None


def text_fits(configs: Configs) -> str | None:
    """A check that the transformer takes states as wide as those of the text encoder."""
    taken = configs["transformer"]["joint_attention_dim"]
    given = configs["text_encoder"]["text_config"]["hidden_size"]
    return None if taken == given else f"the transformer takes text of width {taken}, but text_encoder gives {given}"


FAMILY = Family(
    name="qwen",
    pipeline=PIPELINES["qwen"],
    denoiser="transformer",
    denoiser_class="QwenImageTransformer2DModel",
    beta=2000.0,
    guidance=4.0,
    tokenizers=(("tokenizer", QWEN_TOKENIZER),),
    text_encoders=(("text_encoder", "Qwen2_5_VLForConditionalGeneration"),),
    encode=encode,
    predict=predict,
    pipeline_options=lambda model: {},
    checks=(
        number("transformer", "in_channels"),
        number("vae", "z_dim"),
        equal("transformer", "patch_size", PACK),
        equal("vae", "input_channels", 3),
        absent("transformer", "guidance_embeds", "the transformer takes its guidance scale as an input"),
        absent(
            "transformer", "zero_cond_t", "the transformer of an image-editing model takes an image beside the noise"
        ),
        absent(
            "transformer", "use_additional_t_cond", "the transformer of a layered model takes an image beside the noise"
        ),
        absent("transformer", "use_layer3d_rope", "the transformer of a layered model gives several images"),
        turns_match(3),
        latents_fit,
        scaling_fits,
        text_fits,
    ),
    geometry=geometry,
    posterior=posterior,
    decode=decode,
    scaling=scaling,
    vae_class="AutoencoderKLQwenImage",
    lora_targets=(
        *JOINT_ATTENTION,
        "img_mlp.net.2",
        "txt_mlp.net.2",
    ),
    flow=Flow(text_tokens=512, blank=blank),
)
