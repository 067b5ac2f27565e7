"""The peers' step on a device, in their order of work and with their choices: what ours is compared with.

Micro-batch 1, fp16 autocast without a compiler, images and captions encoded in every step, noise from a stream, the
reference live. SDXL: gradient checkpointing, the VAE whose activations fit fp16, Adafactor. LoRA: frozen weights in fp16,
adapters in fp32, the reference with adapters off.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.sizes import Size, make_unet, make_vae
from benchmarks.step import peers_encoding, peers_loss
from dpo import reference
from dpo.models import lora
from dpo.models.denoiser import use_checkpointing
from dpo.models.family import Denoise, TextEncoding

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


def peers_step(
    model: Size, device: torch.device, low_rank: bool = False, pairs: int = 1
) -> tuple[Callable[[], Any], list[Tensor]]:
    """(a micro-step, forward and backward, what it trains)."""
    from transformers import CLIPTextConfig, CLIPTextModel

    half = torch.float16 if device.type == "cuda" else torch.float32
    policy = make_unet(model, device)
    layers: list[Any] = []
    twin: nn.Module | None = None
    if low_rank:
        layers = lora.add(policy.to(half), rank=8, alpha=8.0, target_modules=TARGETS, dropout=0.0, seed=0)
        policy.to(device)
    else:
        twin = reference.frozen(policy, None).to(half)
        policy.requires_grad_(True)
    use_checkpointing(policy, "on" if model.peer_checkpointing else "off")
    vae = make_vae(model, device).to(half)
    tokens = model.text[0]
    encoders = [
        CLIPTextModel(CLIPTextConfig(**config, vocab_size=49408, max_position_embeddings=tokens))
        for config in model.encoders
    ]
    encoders = [encoder.to(device, half).requires_grad_(False) for encoder in encoders]
    side = 8 * model.unet["sample_size"]
    pixels = torch.rand(2 * pairs, 3, side, side, device=device) * 2 - 1
    ids = torch.ones(pairs, tokens, dtype=torch.int64, device=device)
    abar = torch.linspace(0.999, 0.005, 1000, device=device)
    pooled = None if model.pooled is None else torch.randn(pairs, model.pooled, device=device, dtype=half)
    sizes = torch.tensor([float(side), side, 0, 0, side, side], device=device).repeat(2 * pairs, 1)

    def wrapped(module: nn.Module) -> Denoise:
        def denoise(x_t: Tensor, t: Tensor, text: TextEncoding, sizes: Tensor | None) -> Tensor:
            added = None if text.pooled is None else {"text_embeds": text.pooled, "time_ids": sizes}
            x_t = x_t.to(half) if module is twin else x_t
            with torch.autocast(device.type, half, enabled=device.type == "cuda"):
                return module(x_t, t, text.hidden, added_cond_kwargs=added).sample

        return denoise

    def encode_text() -> TextEncoding:
        return TextEncoding(torch.cat([encoder(ids).last_hidden_state for encoder in encoders], dim=-1), pooled)

    ours = wrapped(policy)
    theirs = reference.from_adapters(ours, layers) if twin is None else wrapped(twin)

    def step() -> None:
        latents, text = peers_encoding(vae, pixels, encode_text)
        peers_loss(ours, theirs, latents, text, sizes, abar).backward()

    return step, [p for p in policy.parameters() if p.requires_grad]
