"""FLOPs of training on one pair, counted: from images, from a prepared store, and with recorded reference errors.

    python -m benchmarks.flops [--out FOLDER]

The real UNets (SD 1.5 at 512 px, SDXL at 1024 px) run forward and backward on fake tensors: no memory, no arithmetic,
every convolution, matrix product and attention seen, so that checkpointing's second forward is in the count and the
weight gradients of frozen layers are not. A multiply-add is two FLOPs. "peers" are the published trainers: images,
captions and reference anew for every pair; "peers / ours" compares them with prepared + recorded.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measuring import Results, about, markdown
from benchmarks.peers import TARGETS
from benchmarks.sizes import SD15, SDXL, VAE, Size
from dpo.models import lora
from dpo.models.denoiser import use_checkpointing
from dpo.training import flops

TERA = 1e12
PEERS = {  # (model, LoRA, checkpointing): TFLOP per pair
    ("SD 1.5, 512 px", False, False): 8.79,
    ("SD 1.5, 512 px", False, True): 10.2,
    ("SD 1.5, 512 px", True, False): 7.42,
    ("SDXL, 1024 px", False, False): 64.6,
    ("SDXL, 1024 px", False, True): 77.0,
    ("SDXL, 1024 px", True, False): 52.4,
}
SIDES = {"SD 1.5, 512 px": 512, "SDXL, 1024 px": 1024}


def count(work: Any) -> int:
    """FLOPs of what `work` calls, backward included."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def fake_unet(model: Size, low_rank: bool, checkpointing: bool) -> nn.Module:
    """A UNet on the meta device, ready to be trained."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**model.unet).requires_grad_(not low_rank).train()
        if low_rank:
            lora.add(unet, rank=8, alpha=8, target_modules=TARGETS, dropout=0.0, seed=0)
    use_checkpointing(unet, "on" if checkpointing else "off")
    return unet


def image_flops(model: Size, low_rank: bool, checkpointing: bool) -> tuple[int, int]:
    """(forward, forward and backward) of one image through the UNet."""
    unet = fake_unet(model, low_rank, checkpointing)
    side = SIDES[model.name] // 8
    with torch.device("meta"):
        x, t, text = torch.empty(1, 4, side, side), torch.empty(1, dtype=torch.long), torch.empty(1, *model.text)
        more = (
            {} if model.pooled is None else {"text_embeds": torch.empty(1, model.pooled), "time_ids": torch.empty(1, 6)}
        )

    def forward() -> torch.Tensor:
        predicted: torch.Tensor = unet(x, t, text, added_cond_kwargs=more, return_dict=False)[0]
        return predicted

    with torch.no_grad():
        alone = count(forward)
    return alone, count(lambda: forward().sum().backward())


def encode_flops(model: Size) -> tuple[int, int]:
    """(VAE on one image, text encoders on one caption)."""
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import CLIPTextConfig, CLIPTextModel

    text = 0
    for config in model.encoders:
        with FakeTensorMode(), torch.no_grad():
            encoder = CLIPTextModel(CLIPTextConfig(**config)).eval()
            text += count(lambda encoder=encoder: encoder(torch.zeros(1, 77, dtype=torch.long)))
    return flops.vae_encode_flops(VAE, SIDES[model.name], SIDES[model.name]), text


def rows(models: tuple[Size, ...] = (SD15, SDXL)) -> list[dict[str, Any]]:
    """TFLOP of training on one pair, by model, what is trained, checkpointing and what is read."""
    found = []
    for model in models:
        vae, text = encode_flops(model)
        for low_rank in (False, True):
            for checkpointing in (False, True):
                forward, both = image_flops(model, low_rank, checkpointing)
                train, reference, encode = 2 * both, 2 * flops_of_reference(model, forward, low_rank), 2 * vae + text
                pair = {
                    "images": train + reference + encode,
                    "prepared": train + reference,
                    "prepared + recorded": train,
                }
                row: dict[str, Any] = {"model": model.name, "trained": "LoRA" if low_rank else "full"}
                row |= {"checkpointing": "on" if checkpointing else "off"}
                row |= {name: value / TERA for name, value in pair.items()}
                peers = PEERS.get((model.name, low_rank, checkpointing))
                found.append(row | {"peers": peers, "peers / ours": peers and peers / (train / TERA)})
    return found


def flops_of_reference(model: Size, forward: int, low_rank: bool) -> int:
    """Forward of the reference: without adapters, if the policy has them."""
    return (
        flops.unet_flops(model.unet, SIDES[model.name] // 8, SIDES[model.name] // 8, model.text[0])
        if low_rank
        else forward
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/flops"), help="folder of the table (default: %(default)s)"
    )
    out = parser.parse_args(argv).out
    results = Results(out, about(torch.device("cpu")))
    table = rows()
    for row in table:
        results.add("flops", row)
    text = "TFLOP per pair\n\n" + markdown(table, list(table[0]))
    results.write("flops.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
