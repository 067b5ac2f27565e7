"""FLOPs of training on one pair, counted: from images, from a prepared store, and with recorded reference errors.

    python -m benchmarks.flops [--kind unet|flow ...] [--out FOLDER]

The real denoisers (UNets: SD 1.5 at 512 px, SDXL at 1024 px; transformers at 1024 px) run forward and backward on fake
tensors: no memory, no arithmetic, every convolution, matrix product and attention seen, so that checkpointing's second
forward is in the count and the weight gradients of frozen layers are not. A multiply-add is two FLOPs. "peers" are the
published trainers: images, captions and reference anew for every pair; "peers / ours" compares them with prepared +
recorded, and they are counted for UNets alone. Adapters are of rank 8 in the attention of UNets, of rank 32 in a
transformer's default layers; captions of transformers are as long as their pipelines take them.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
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
from dpo.models.family import Model, TextEncoding
from dpo.planning.sketch import sketch
from dpo.settings.config import Model as Named
from dpo.training import flops
from dpo.training.memory import ATTENTION

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
    with FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
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


def row(
    name: str, low_rank: bool, checkpointing: bool, both: int, reference: int, encode: int, peers: float | None = None
) -> dict[str, Any]:
    """TFLOP of training on one pair by what is read, from FLOPs.

    both: forward and backward of one image; reference: its forward of one image; encode: of a pair; peers: TFLOP.
    """
    train = 2 * both
    pair = {
        "images": train + 2 * reference + encode,
        "prepared": train + 2 * reference,
        "prepared + recorded": train,
    }
    found: dict[str, Any] = {"model": name, "trained": "LoRA" if low_rank else "full"}
    found |= {"checkpointing": "on" if checkpointing else "off"}
    found |= {name: value / TERA for name, value in pair.items()}
    return found | {"peers": peers, "peers / ours": peers and peers / (train / TERA)}


WAYS = tuple(itertools.product((False, True), repeat=2))  # LoRA, checkpointing


def rows(models: tuple[Size, ...] = (SD15, SDXL)) -> list[dict[str, Any]]:
    """TFLOP of training on one pair, by model, what is trained, checkpointing and what is read."""
    found = []
    for model in models:
        vae, text = encode_flops(model)
        for low_rank, checkpointing in WAYS:
            forward, both = image_flops(model, low_rank, checkpointing)
            peers = PEERS.get((model.name, low_rank, checkpointing))
            reference = flops_of_reference(model, forward, low_rank)
            found.append(row(model.name, low_rank, checkpointing, both, reference, 2 * vae + text, peers))
    return found


FLOWS = {  # what is counted -> hub id
    "SD 3.5 medium, 1024 px": "stabilityai/stable-diffusion-3.5-medium",
    "FLUX.1-dev, 1024 px": "black-forest-labs/FLUX.1-dev",
    "FLUX.2 klein 4B, 1024 px": "black-forest-labs/FLUX.2-klein-base-4B",
    "Qwen-Image, 1024 px": "Qwen/Qwen-Image",
}
RANK = 32


def flow_rows(models: Mapping[str, str] = FLOWS, side: int | None = None) -> list[dict[str, Any]]:
    """`rows` of models of flow matching; side: pixels, None for what each was trained at."""
    found = []
    for name, model in models.items():
        whole = sketch(Named(model=model))
        pixels = side or whole.geometry.native
        vae = flops.vae_encode_flops(whole.vae.config, pixels, pixels, whole.family.name)
        alone, text = flow_flops(whole, pixels), caption_flops(whole)
        for low_rank, checkpointing in WAYS:
            trained = sketch(Named(model=model))
            with torch.device("meta"):
                trained.denoiser.requires_grad_(not low_rank)
                if low_rank:
                    targets = trained.family.lora_targets
                    lora.add(trained.denoiser, rank=RANK, alpha=RANK, target_modules=targets, dropout=0.0, seed=0)
            use_checkpointing(trained.denoiser, "on" if checkpointing else "off")
            both = flow_flops(trained, pixels, backward=True)
            found.append(row(name, low_rank, checkpointing, both, alone, 2 * vae + text))
    return found


@contextmanager
def made(*modules: nn.Module) -> Iterator[None]:
    """Inside the block modules of a sketch work on a CPU, in fake tensors."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in modules:
            module.to_empty(device="cpu")
        yield


def caption_flops(model: Model) -> int:
    """FLOPs of encoding one caption by a sketch's text encoders, which are used up."""
    with made(*model.text_encoders), torch.no_grad():
        return count(lambda: model.family.encode(model, [""]))


def flow_flops(model: Model, pixels: int, backward: bool = False) -> int:
    """FLOPs of one image through a sketch's denoiser, forward, and backward where asked; the denoiser is used up."""
    assert model.family.flow is not None, "a model of flow matching"
    shape, encoding = model.geometry, model.family.flow.blank(model)
    with made(model.denoiser), torch.set_grad_enabled(backward):
        x, t = torch.empty(1, shape.channels, *[pixels // shape.vae_scale] * 2), torch.empty(1)
        text = TextEncoding(*(x if x is None else torch.empty(x.shape, dtype=x.dtype) for x in encoding))

        def forward() -> torch.Tensor:
            return model.denoise(model.denoiser)(x, t, text, None)

        return count(lambda: forward().sum().backward() if backward else forward())


def flops_of_reference(model: Size, forward: int, low_rank: bool) -> int:
    """Forward of the reference: without adapters, if the policy has them."""
    return (
        flops.unet_flops(model.unet, SIDES[model.name] // 8, SIDES[model.name] // 8, model.text[0])
        if low_rank
        else forward
    )


KINDS = {"unet": rows, "flow": flow_rows}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks.flops", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/flops"), help="folder of the table (default: %(default)s)"
    )
    parser.add_argument("--kind", choices=KINDS, nargs="+", default=list(KINDS), help="of denoisers (default: both)")
    own = parser.parse_args(argv)
    results = Results(own.out, about(torch.device("cpu")))
    table = [row for kind in own.kind for row in KINDS[kind]()]
    for row in table:
        results.add("flops", row)
    text = "TFLOP per pair\n\n" + markdown(table, list(table[0]))
    results.write("flops.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
