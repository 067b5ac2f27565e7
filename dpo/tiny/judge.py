"""Judges: small networks that read the traits of a picture, so that it can be scored and compared with its caption.

Two judges of different architecture and seed ship: "a" labels pairs and serves tuning, "b" is kept for reported
figures. Faithfulness (object and colour as captioned) stands beside every win rate: a model can please the taste and
forget the caption.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from safetensors import safe_open

from dpo.tiny.paths import ASSETS
from dpo.tiny.world import BACKDROPS, COLOURS, PLAIN, SIZES, named, taste


@dataclass(frozen=True)
class Reading:
    """What a judge sees in N pictures."""

    object: np.ndarray  # [N, O] probabilities
    colour: np.ndarray  # [N, C] probabilities
    three_d: np.ndarray  # [N] probability
    backdrop: np.ndarray  # [N, B] probabilities
    size: np.ndarray  # [N] share of the canvas, clipped to SIZES
    offset: np.ndarray  # [N, 2]

    @property
    def plain(self) -> np.ndarray:
        """[N] probability of a plain backdrop."""
        return self.backdrop[:, PLAIN]


def score(reading: Reading) -> np.ndarray:
    """The hidden taste's score of each picture, 0..3."""
    return taste(reading.three_d, reading.plain, reading.size)


@dataclass(frozen=True)
class Judge:
    """A trained network and the objects that it tells apart, in the order of its classes."""

    network: nn.Sequential  # ending in Heads; float [N, 3, 64, 64] in -1..1 -> {head: [N, outputs]}
    objects: tuple[str, ...]

    @torch.no_grad()
    def features(self, images_NHWC: np.ndarray, batch: int = 128) -> torch.Tensor:
        """What the heads read the traits from, float32 [N, width], of pictures, uint8 [N, 64, 64, 3]."""
        trunk = self.network[:-1]
        return torch.cat([trunk(pixels(images_NHWC[i : i + batch])) for i in range(0, len(images_NHWC), batch)])

    @torch.no_grad()
    def read(self, images_NHWC: np.ndarray, batch: int = 128) -> Reading:
        """The traits of pictures, uint8 [N, 64, 64, 3]."""
        parts = [self.network(pixels(images_NHWC[i : i + batch])) for i in range(0, len(images_NHWC), batch)]
        heads = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        return Reading(
            object=heads["object"].softmax(-1).numpy(),
            colour=heads["colour"].softmax(-1).numpy(),
            three_d=heads["style"].sigmoid().squeeze(-1).numpy(),
            backdrop=heads["backdrop"].softmax(-1).numpy(),
            size=heads["size"].squeeze(-1).clamp(*SIZES).numpy(),
            offset=heads["offset"].numpy(),
        )

    def faithful(self, reading: Reading, captions: list[str]) -> np.ndarray:
        """[N] bool: object and colour are the ones the caption names."""
        objects = np.array([named(text, self.objects) for text in captions])
        colours = np.array([named(text, COLOURS) for text in captions])
        return (reading.object.argmax(-1) == objects) & (reading.colour.argmax(-1) == colours)


class Heads(nn.Module):
    """One linear layer per trait over pooled features [N, width]."""

    def __init__(self, width: int, objects: int):
        super().__init__()
        classes = {"object": objects, "colour": len(COLOURS), "style": 1, "backdrop": len(BACKDROPS)}
        sizes = classes | {"size": 1, "offset": 2}
        self.heads = nn.ModuleDict({name: nn.Linear(width, n) for name, n in sizes.items()})

    def forward(self, features: torch.Tensor) -> dict[str, torch.Tensor]:
        return {name: head(features) for name, head in self.heads.items()}


class Residual(nn.Module):
    """x + layers(x)"""

    def __init__(self, *layers: nn.Module):
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.layers(x)


def norm_conv(inside: int, outside: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """GroupNorm, SiLU and a convolution that divides height and width by `stride`."""
    convolution = nn.Conv2d(inside, outside, kernel, stride, padding=(kernel - stride + 1) // 2)
    return nn.Sequential(nn.GroupNorm(8, inside), nn.SiLU(), convolution)


def plain_pyramid(objects: int) -> nn.Sequential:
    """Judge a: strided 3x3 convolutions with one residual block per scale; mean and maximum pooled."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 4, 2, 1),  # 32x32
        norm_conv(32, 48, 4, 2),  # 16x16
        Residual(norm_conv(48, 48)),
        norm_conv(48, 96, 4, 2),  # 8x8
        Residual(norm_conv(96, 96)),
        norm_conv(96, 128, 4, 2),  # 4x4
        nn.GroupNorm(8, 128),
        nn.SiLU(),
        nn.Flatten(),
        nn.Linear(128 * 16, 64),
        nn.SiLU(),
        Heads(64, objects),
    )


def patch_mixer(objects: int) -> nn.Sequential:
    """Judge b: 4x4 patches, wide depthwise convolutions and pointwise layers; averaged over places."""

    def block(width: int) -> Residual:
        return Residual(
            nn.Conv2d(width, width, 5, padding=2, groups=width),
            nn.GroupNorm(1, width),
            nn.Conv2d(width, 2 * width, 1),
            nn.GELU(),
            nn.Conv2d(2 * width, width, 1),
        )

    return nn.Sequential(
        nn.Conv2d(3, 64, 4, 4),  # 16x16
        block(64),
        block(64),
        nn.Conv2d(64, 128, 2, 2),  # 8x8
        block(128),
        block(128),
        block(128),
        nn.Conv2d(128, 32, 1),
        nn.GELU(),
        nn.Flatten(),
        nn.Linear(32 * 64, 96),
        nn.GELU(),
        Heads(96, objects),
    )


ARCHITECTURES = {"a": plain_pyramid, "b": patch_mixer}


def load_judge(name: str) -> Judge:
    """Judge "a" or "b" of the package."""
    return load_judge_file(ASSETS / "judges" / f"{name}.safetensors")


def load_judge_file(path: Path) -> Judge:
    """A judge as making/judges.py saved it: half-precision weights, and a note of its architecture and objects."""
    with safe_open(path, "pt") as file:
        note = json.loads(file.metadata()["judge"])
        weights = {key: file.get_tensor(key).float() for key in file.keys()}  # noqa: SIM118 (not a dict)
    objects = tuple(note["objects"])
    network = ARCHITECTURES[note["architecture"]](len(objects))
    network.load_state_dict(weights)
    return Judge(network.eval().requires_grad_(False), objects)


def pixels(images_NHWC: np.ndarray) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float [N, 3, H, W] in -1..1"""
    return torch.from_numpy(images_NHWC).permute(0, 3, 1, 2).float() / 127.5 - 1
