"""Counted FLOPs of a training step (a multiply-add is two) and the peaks of known GPUs, for TFLOP/s and MFU.

The count runs the real forward on the meta device: without memory or arithmetic, it sees every convolution, matrix
product and attention.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch.utils.flop_counter import FlopCounterMode

from dpo.models.family import Model, TextEncoding, families

RGB = 3

# Dense bf16 peak in TFLOP/s by vendor data sheet, first match wins: longer names stand before their prefixes.
PEAK_BF16_TFLOPS = (
    ("GB200", 2500.0), ("B200", 2250.0), ("B100", 1750.0),
    ("GH200", 989.4), ("H200 NVL", 835.5), ("H200", 989.4), ("H100 NVL", 835.5), ("H100 PCIe", 756.0), ("H100", 989.4),
    ("H20", 148.0), ("H800", 989.4),
    ("A100", 311.9), ("A800", 311.9), ("A6000", 154.8), ("A40", 149.7), ("A30", 165.0), ("A10G", 70.0), ("A10", 125.0),
    ("L40S", 362.1), ("L40", 181.1), ("L4", 121.0), ("6000 Ada", 364.2),
    ("RTX 5090", 209.5), ("RTX 5080", 112.6), ("RTX 4090", 165.2), ("RTX 4080", 97.5), ("RTX 3090", 71.2),
    ("MI300X", 1307.4), ("MI325X", 1307.4), ("MI250X", 383.0),
)  # fmt: skip


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of the GPU in TFLOP/s, None for a device that is not in the table, such as a CPU."""
    words = f" {device_name.replace('-', ' ')} "
    return next((peak for name, peak in PEAK_BF16_TFLOPS if f" {name} " in words), None)


def unet_flops(config: Mapping[str, Any], height: int, width: int, text_length: int = 77) -> int:
    """FLOPs of one image's forward through a `UNet2DConditionModel` of this config.

    height and width are those of the latents, text_length is in tokens. Adapters are not counted (rank 8 adds under 1
    %).
    """
    return _unet_flops(_architecture(config), height, width, text_length)


def forward_flops(model: Model, height: int, width: int) -> int:
    """FLOPs of one image's forward through a model's denoiser; height and width are those of the latents."""
    family = model.family
    if family.flow is None:
        return unet_flops(model.denoiser.config, height, width, model.text_encoders[0].config.max_position_embeddings)
    text = family.flow.blank(model)
    shapes = tuple(None if x is None else (tuple(x.shape), x.dtype) for x in text)
    architecture, channels = _architecture(model.denoiser.config), model.geometry.channels
    return _transformer_flops(family.name, architecture, (1, channels, height, width), shapes, model.guidance)


def vae_encode_flops(config: Mapping[str, Any], height: int, width: int, family: str = "sd") -> int:
    """FLOPs of encoding one image of height x width pixels by a VAE of this config, as a family has it."""
    return _vae_encode_flops(family, _architecture(config), height, width)


@functools.cache
def _unet_flops(architecture: str, height: int, width: int, text_length: int) -> int:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(json.loads(architecture))
        sample = torch.empty(1, unet.config.in_channels, height, width)
        text = torch.empty(1, text_length, unet.config.cross_attention_dim)
        timestep = torch.empty(1, dtype=torch.long)
        conditions = _added_conditions(unet.config)
        return _count(lambda: unet(sample, timestep, text, added_cond_kwargs=conditions))


@functools.cache
def _transformer_flops(
    family: str, architecture: str, latents: tuple[int, ...], text: tuple, guidance: float | None
) -> int:
    import diffusers

    kind = families()[family]
    with torch.device("meta"):
        module = getattr(diffusers, kind.denoiser_class).from_config(json.loads(architecture))
        hidden, *others = (None if x is None else torch.empty(x[0], dtype=x[1]) for x in text)
        assert hidden is not None, "every family has it"
        encoding = TextEncoding(hidden, *others)
        inputs = torch.empty(latents), torch.empty(1), encoding, None
        told = {} if guidance is None else {"guidance": guidance}
        return _count(lambda: kind.predict(module, *inputs, **told))


@functools.cache
def _vae_encode_flops(family: str, architecture: str, height: int, width: int) -> int:
    import diffusers

    kind = families()[family]
    with torch.device("meta"):
        vae = getattr(diffusers, kind.vae_class).from_config(json.loads(architecture))
        return _count(lambda: kind.posterior(vae, torch.empty(1, RGB, height, width)))


def _architecture(config: Mapping[str, Any]) -> str:
    """A config as JSON, the key under which a count is cached. It leaves out the path of the weights."""
    return json.dumps(
        {name: value for name, value in config.items() if name != "_name_or_path"}, sort_keys=True, default=str
    )


def pair_flops(
    forward: float,
    *,
    trainable: Literal["full", "lora"] = "full",
    recompute: float = 0.0,
    reference: Literal["live", "recorded"] | None = "live",
    halves: int = 2,
    encode: float = 0.0,
) -> float:
    """FLOPs of training on one pair, from the forward FLOPs of one image through the UNet.

    The backward of full fine-tuning costs two forwards (activations and weights), that of adapters one (activations).
    recompute: share of the forward that checkpointing runs again (0 for MFU, which counts useful work only). reference:
    "live" adds its forward, "recorded" and None add nothing. halves: 2 images of a pair, 1 where only the winner is
    used (sft). encode: FLOPs of the VAE encoding of one image where latents are not cached.
    """
    backward = {"full": 2.0, "lora": 1.0}[trainable]
    forwards = 1.0 + backward + recompute + (1.0 if reference == "live" else 0.0)
    return halves * (forward * forwards + encode)


def _added_conditions(config: Any) -> dict[str, torch.Tensor]:
    """SDXL's pooled text and six sizes, for one image; empty for families without them."""
    if config.addition_embed_type != "text_time":
        return {}
    sizes = 6
    pooled = config.projection_class_embeddings_input_dim - sizes * config.addition_time_embed_dim
    return {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, sizes)}


def _count(forward: Callable[[], object]) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        forward()
    return counter.get_total_flops()
