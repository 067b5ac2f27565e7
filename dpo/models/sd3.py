"""Stable Diffusion 3 and 3.5: rectified flow, two CLIP encoders and T5, which a pipeline may come without.

Esser et al. 2024, arXiv 2403.03206.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpo.models.checks import Configs, latents_match, number, scaling_said
from dpo.models.family import JOINT_ATTENTION, Family, Flow, Geometry, Model, TextEncoding, levels_of
from dpo.models.text import T5_TOKENIZER, TOKENIZER, run_encoder
from dpo.settings.families import PIPELINES


def encode(model: Model, captions: list[str]) -> TextEncoding:
    """B captions -> hidden states [B, 77 + S, D] and pooled vectors [B, P].

    The penultimate states of the CLIP encoders side by side, widened by zeros to T5's width, then the states of T5 (zeros
    without it), S tokens with their padding, which this model attends to; the CLIP encoders' projections side by side.
    """
    clips = [
        run_encoder(tokenizer, encoder, captions, output_hidden_states=True)
        for tokenizer, encoder in zip(model.tokenizers[:2], model.text_encoders[:2], strict=True)
    ]
    short = torch.cat([out.hidden_states[-2] for out in clips], dim=-1)
    width, tokens = model.denoiser.config["joint_attention_dim"], model.text_tokens
    assert tokens is not None, "of a flow"
    if len(model.text_encoders) == 3:
        long = run_encoder(model.tokenizers[2], model.text_encoders[2], captions, tokens)[0]
    else:
        long = short.new_zeros(len(captions), tokens, width)
    hidden = torch.cat([F.pad(short, (0, width - short.shape[-1])), long], dim=1)
    return TextEncoding(hidden, torch.cat([out[0] for out in clips], dim=-1))


def blank(model: Model) -> TextEncoding:
    """See `family.Flow`."""
    config, tokens = model.denoiser.config, model.text_tokens
    assert tokens is not None, "of a flow"
    clip = model.text_encoders[0].config.max_position_embeddings
    hidden = torch.empty(1, clip + tokens, config["joint_attention_dim"], device="meta")
    return TextEncoding(hidden, torch.empty(1, config["pooled_projection_dim"], device="meta"))


def predict(module: nn.Module, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
    """See `family.Denoise`; `sizes` is not used."""
    return module(
        hidden_states=x_t,
        timestep=t,
        encoder_hidden_states=text.hidden,
        pooled_projections=text.pooled,
        return_dict=False,
    )[0]


def geometry(transformer: Mapping[str, Any], vae: Mapping[str, Any]) -> Geometry:
    """Of a transformer that cuts its latents into patches."""
    scale = levels_of(vae)
    patch = scale * transformer["patch_size"]
    largest = patch * transformer["pos_embed_max_size"]  # of its table of positions
    return Geometry(vae["latent_channels"], scale, patch, int(transformer["sample_size"]) * scale, largest)


def pooled_width(configs: Configs) -> str | None:
    """A check that the transformer takes the CLIP encoders' pooled vectors side by side."""
    taken = configs["transformer"]["pooled_projection_dim"]
    given = sum(configs[part]["projection_dim"] for part in ("text_encoder", "text_encoder_2"))
    return None if taken == given else f"the transformer takes {taken} numbers for pooled text, but is given {given}"


def text_fits(configs: Configs) -> str | None:
    """A check that the transformer takes states as wide as T5's, and no narrower than those of both CLIP encoders."""
    taken = configs["transformer"]["joint_attention_dim"]
    clips = sum(configs[part]["hidden_size"] for part in ("text_encoder", "text_encoder_2"))
    long = configs["text_encoder_3"]["d_model"] if "text_encoder_3" in configs else taken
    if taken == long and clips <= taken:
        return None
    return f"the transformer takes text of width {taken}, but T5 gives {long} and the CLIP encoders {clips}"


FAMILY = Family(
    name="sd3",
    pipeline=PIPELINES["sd3"],
    denoiser="transformer",
    denoiser_class="SD3Transformer2DModel",
    beta=2000.0,
    guidance=7.0,
    tokenizers=(("tokenizer", TOKENIZER), ("tokenizer_2", TOKENIZER), ("tokenizer_3", T5_TOKENIZER)),
    text_encoders=(
        ("text_encoder", "CLIPTextModelWithProjection"),
        ("text_encoder_2", "CLIPTextModelWithProjection"),
        ("text_encoder_3", "T5EncoderModel"),
    ),
    optional=("text_encoder_3", "tokenizer_3"),
    encode=encode,
    predict=predict,
    pipeline_options=lambda model: {},
    checks=(
        number("transformer", "sample_size"),
        number("transformer", "patch_size"),
        number("transformer", "pos_embed_max_size"),
        number("vae", "scaling_factor", whole=False),
        number("vae", "shift_factor", whole=False),
        latents_match("transformer"),
        scaling_said,
        pooled_width,
        text_fits,
    ),
    geometry=geometry,
    lora_targets=JOINT_ATTENTION,
    flow=Flow(text_tokens=256, blank=blank, longest=512, even_steps=False),
)
