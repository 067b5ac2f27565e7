"""The models whose training is measured, by their published configs, with random weights; and one small enough for a CPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

SD15_UNET = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
    "block_out_channels": (320, 640, 1280, 1280),
}
SDXL_UNET = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL_UNET = {
    "sample_size": 16,
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "block_out_channels": (32, 64),
    "norm_num_groups": 8,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}


CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
BIG_G = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


@dataclass(frozen=True)
class Size:
    """What is measured: a UNet of this config, the text it is given, and the peers' way of running it.

    activations: GiB that an image leaves for the backward pass, in plain torch and with kernels, by a plan. predicted:
    (pairs/s, MFU) on an H100 from a recorded reference, eager with kernels, by the number of pairs; peers: pairs/s.
    """

    name: str
    family: str
    unet: dict[str, Any]
    text: tuple[int, int]  # tokens, width
    pooled: int | None
    encoders: tuple[dict[str, Any], ...]
    parameters: int
    activations: tuple[float, float]
    peer_checkpointing: bool
    peer_optimizer: str
    pairs: tuple[int, ...]  # of the ladder, the first is the headline
    predicted: dict[int, tuple[float, float]]
    peers: float | None


SD15 = Size(
    "SD 1.5, 512 px", "sd", SD15_UNET, (77, 768), None, (CLIP_L,), 859_520_964, (1.16, 0.72),
    False, "adamw", (16, 32, 64), {16: (60.0, 0.29)}, 18.5,
)  # fmt: skip
SDXL = Size(
    "SDXL, 1024 px", "sdxl", SDXL_UNET, (77, 2048), 1280, (CLIP_L, BIG_G), 2_567_463_684, (8.05, 5.39),
    True, "adafactor", (2, 4, 8), {4: (9.2, 0.38)}, 3.6,
)  # fmt: skip


def small_model() -> Size:
    """For a CPU and for checks."""
    encoder = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    return Size(
        "small", "sd", SMALL_UNET, (7, 32), None, (encoder,), 1_000_000, (0.01, 0.01), False, "adamw", (2,), {}, None
    )


def make_unet(model: Size, device: torch.device) -> nn.Module:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    with torch.device(device):
        return UNet2DConditionModel(**model.unet).requires_grad_(False).eval()


def make_vae(model: Size, device: torch.device) -> nn.Module:
    from diffusers import AutoencoderKL

    small = {"block_out_channels": (16, 32, 32, 32), "layers_per_block": 1, "norm_num_groups": 8}
    with torch.device(device):
        return AutoencoderKL(**(VAE | (small if model.name == "small" else {}))).requires_grad_(False).eval()
