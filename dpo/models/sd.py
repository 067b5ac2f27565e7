"""Stable Diffusion 1.x and 2.x (epsilon and v-prediction): one CLIP text encoder, no micro-conditioning."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from dpo.models.checks import UNET, absent, text_width
from dpo.models.family import Family, Model, TextEncoding
from dpo.models.text import TOKENIZER, run_encoder
from dpo.settings.families import PIPELINES


def encode(model: Model, captions: list[str]) -> TextEncoding:
    """B captions -> the text encoder's last hidden state [B, S, D]."""
    return TextEncoding(run_encoder(model.tokenizers[0], model.text_encoders[0], captions)[0])


def predict(module: nn.Module, x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
    """See `family.Denoise`; `sizes` is not used."""
    return module(x_t, t, encoder_hidden_states=text.hidden, return_dict=False)[0]


def pipeline_options(model: Model) -> dict[str, Any]:
    """A pipeline without the safety checker, which is no part of the training."""
    return {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


FAMILY = Family(
    name="sd",
    pipeline=PIPELINES["sd"],
    denoiser="unet",
    denoiser_class="UNet2DConditionModel",
    beta=2000.0,
    guidance=7.5,
    tokenizers=(("tokenizer", TOKENIZER),),
    text_encoders=(("text_encoder", "CLIPTextModel"),),
    encode=encode,
    predict=predict,
    pipeline_options=pipeline_options,
    single_file_key="model.diffusion_model.",
    single_file_options={"safety_checker": None},
    checks=(
        *UNET,
        text_width("text_encoder"),
        absent("unet", "addition_embed_type", "the UNet takes pooled text, sizes or images beside the caption"),
    ),
    architectures=("stable-diffusion-v1", "stable-diffusion-v2"),
    kohya_name=lambda name, denoiser: name,
)
