"""Inception Score (T. Salimans et al., 2016): exp of the mean divergence of an image's classes from the set's.

The published weights are two networks, not one, and their scores differ, so they have two names. `inception-tv` is
torchvision's: 1000 classes, average pools that count the padding. `inception-tf` is TensorFlow's of 2015, by which the
score was defined (the file that FID tools use, in the same key names): 1008 classes read without their bias, average
pools that leave the padding out, a maximum in the last block, TensorFlow's own resizing. The DDE paper scores 50 images
of each of 1000 prompts, `imagenet-classes` of dpo/drawing/prompts.py, in ten splits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.scorers.compare import Interval
from dpo.scorers.pixels import cropped, normalised, whole
from dpo.scorers.published import converted, fill, header, read

SPLITS, SIDE, BATCH = 10, 299, 32
T95 = 2.262157  # Student's t with SPLITS - 1 degrees of freedom: 95 % lie on either side within


class Conv(NamedTuple):
    """A convolution without bias, batch norm (eps 1e-3) and ReLU, under its published name."""

    name: str
    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padded: bool = True  # by half the kernel


# A branch is a row of steps: a convolution, two of them side by side, or one of the pools: "average" and "maximum" keep
# the size, "halve" is a maximum of 3 x 3 at every second place.
Step = Conv | tuple[Conv, Conv] | str
Branches = tuple[tuple[Step, ...], ...]
TALL, WIDE = (7, 1), (1, 7)


def _side_by_side(step: Step) -> tuple[Conv, ...]:
    """The convolutions of a step; none for a pool."""
    if isinstance(step, str):
        return ()
    return (step,) if isinstance(step, Conv) else step


def _halving(name: str, width: int) -> Conv:
    return Conv(name, width, (3, 3), 2, False)


def _a(pooled: int) -> Branches:
    return (
        (Conv("branch1x1", 64),),
        (Conv("branch5x5_1", 48), Conv("branch5x5_2", 64, (5, 5))),
        (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), Conv("branch3x3dbl_3", 96, (3, 3))),
        ("average", Conv("branch_pool", pooled)),
    )


def _c(inner: int) -> Branches:
    return (
        (Conv("branch1x1", 192),),
        (Conv("branch7x7_1", inner), Conv("branch7x7_2", inner, WIDE), Conv("branch7x7_3", 192, TALL)),
        (
            Conv("branch7x7dbl_1", inner),
            Conv("branch7x7dbl_2", inner, TALL),
            Conv("branch7x7dbl_3", inner, WIDE),
            Conv("branch7x7dbl_4", inner, TALL),
            Conv("branch7x7dbl_5", 192, WIDE),
        ),
        ("average", Conv("branch_pool", 192)),
    )


def _e(pool: str) -> Branches:
    return (
        (Conv("branch1x1", 320),),
        (Conv("branch3x3_1", 384), (Conv("branch3x3_2a", 384, (1, 3)), Conv("branch3x3_2b", 384, (3, 1)))),
        (
            Conv("branch3x3dbl_1", 448),
            Conv("branch3x3dbl_2", 384, (3, 3)),
            (Conv("branch3x3dbl_3a", 384, (1, 3)), Conv("branch3x3dbl_3b", 384, (3, 1))),
        ),
        (pool, Conv("branch_pool", 192)),
    )


def _blocks(last_pool: str) -> dict[str, Branches]:
    """The published table of blocks, by name in the order of the network."""
    return {
        "Mixed_5b": _a(32),
        "Mixed_5c": _a(64),
        "Mixed_5d": _a(64),
        "Mixed_6a": (
            (_halving("branch3x3", 384),),
            (Conv("branch3x3dbl_1", 64), Conv("branch3x3dbl_2", 96, (3, 3)), _halving("branch3x3dbl_3", 96)),
            ("halve",),
        ),
        "Mixed_6b": _c(128),
        "Mixed_6c": _c(160),
        "Mixed_6d": _c(160),
        "Mixed_6e": _c(192),
        "Mixed_7a": (
            (Conv("branch3x3_1", 192), _halving("branch3x3_2", 320)),
            (
                Conv("branch7x7x3_1", 192),
                Conv("branch7x7x3_2", 192, WIDE),
                Conv("branch7x7x3_3", 192, TALL),
                _halving("branch7x7x3_4", 192),
            ),
            ("halve",),
        ),
        "Mixed_7b": _e("average"),
        "Mixed_7c": _e(last_pool),
    }


STEM: tuple[Step, ...] = (
    Conv("Conv2d_1a_3x3", 32, (3, 3), 2, False),
    Conv("Conv2d_2a_3x3", 32, (3, 3), 1, False),
    Conv("Conv2d_2b_3x3", 64, (3, 3)),
    "halve",
    Conv("Conv2d_3b_1x1", 80),
    Conv("Conv2d_4a_3x3", 192, (3, 3), 1, False),
    "halve",
)


class Layer(nn.Module):
    """One `Conv`."""

    def __init__(self, inside: int, conv: Conv):
        super().__init__()
        padding = (conv.kernel[0] // 2, conv.kernel[1] // 2) if conv.padded else 0
        self.conv = nn.Conv2d(inside, conv.width, conv.kernel, conv.stride, padding, bias=False)
        self.bn = nn.BatchNorm2d(conv.width, eps=1e-3)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.bn(self.conv(x)))


class Block(nn.Module):
    """Branches side by side, their channels one after another."""

    def __init__(self, inside: int, branches: Branches, count_padding: bool):
        super().__init__()
        self.branches, self.count_padding, self.width = branches, count_padding, 0
        for branch in branches:
            width = inside
            for step in branch:
                for conv in _side_by_side(step):
                    self.add_module(conv.name, Layer(width, conv))
                width = sum(conv.width for conv in _side_by_side(step)) or width
            self.width += width

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self._branch(x, branch) for branch in self.branches], 1)

    def _branch(self, x: Tensor, branch: tuple[Step, ...]) -> Tensor:
        for step in branch:
            if step == "average":
                x = F.avg_pool2d(x, 3, 1, 1, count_include_pad=self.count_padding)
            elif step == "maximum":
                x = F.max_pool2d(x, 3, 1, 1)
            elif step == "halve":
                x = F.max_pool2d(x, 3, 2)
            else:
                x = torch.cat([self.get_submodule(conv.name)(x) for conv in _side_by_side(step)], 1)
        return x


class InceptionV3(nn.Module):
    """float [N, 3, 299, 299] in -1..1 -> logits [N, classes]. Keys as `from_published` makes them."""

    def __init__(self, kind: Kind):
        super().__init__()
        self.stem = Block(3, (STEM,), kind.count_padding)
        width = self.stem.width
        self.blocks = tuple(_blocks(kind.last_pool))
        for name, branches in _blocks(kind.last_pool).items():
            block = Block(width, branches, kind.count_padding)
            self.add_module(name, block)
            width = block.width
        self.fc = nn.Linear(width, kind.classes)
        self.biased = kind.biased

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return F.linear(x.mean((2, 3)), self.fc.weight, self.fc.bias if self.biased else None)


@dataclass(frozen=True)
class Kind:
    """What tells the published networks apart."""

    name: str
    classes: int
    count_padding: bool  # in average pools
    last_pool: str  # in Mixed_7c
    biased: bool  # whether the classes' bias is added
    preprocessing: str
    source: str  # of the published pickle


TV = Kind("inception-tv", 1000, True, "average", True, "shortest-342-bilinear-crop-299",
          "https://download.pytorch.org/models/inception_v3_google-0cc3c7bd.pth")  # fmt: skip
TF = Kind("inception-tf", 1008, False, "maximum", False, "whole-299-tf1-bilinear",
          "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth")  # fmt: skip


def from_published(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The published state for an `InceptionV3`; one that is already in its keys stays as it is.

    The auxiliary head, which scoring does not read, is left out.
    """
    return {
        f"stem.{key}" if key.startswith("Conv2d_") else key: value
        for key, value in state.items()
        if not key.startswith("AuxLogits.")
    }


def prepared(kind: Kind, images: Sequence[Image.Image]) -> Tensor:
    """[N, 3, 299, 299] float32 of N images of any size, as the network of this kind was published to see them."""
    if kind is TF:
        return torch.stack([(_tf1_bilinear(whole(image).float(), SIDE) - 128) / 128 for image in images])
    squares = [cropped(image, shortest=342, side=SIDE, filter=Image.Resampling.BILINEAR) for image in images]
    return normalised(squares, (0.5,) * 3, (0.5,) * 3)


def _tf1_bilinear(x: Tensor, side: int) -> Tensor:
    """[C, H, W] -> [C, side, side] as TensorFlow 1 resized: corners at 0, no antialiasing."""
    for axis in (1, 2):
        size = x.shape[axis]
        at = torch.arange(side, dtype=torch.float32) * (size / side)
        low = at.floor().long().clamp(max=size - 1)
        part = (at - low).view(-1, *(1,) * (2 - axis))
        first, second = x.index_select(axis, low), x.index_select(axis, (low + 1).clamp(max=size - 1))
        x = first + (second - first) * part
    return x


@dataclass(frozen=True)
class Inception:
    """A set scorer. Higher is better; its features are logits [N, classes]."""

    network: InceptionV3
    kind: Kind
    fingerprint: str

    @property
    def name(self) -> str:
        return self.kind.name

    @torch.inference_mode()
    def features(self, *, images: Sequence[Image.Image]) -> Tensor:
        """[N, classes] float32 on the CPU."""
        weight = self.network.fc.weight
        parts = [torch.empty(0, self.kind.classes)]
        for start in range(0, len(images), BATCH):
            x = prepared(self.kind, images[start : start + BATCH]).to(weight.device, weight.dtype)
            parts.append(self.network(x).float().cpu())
        return torch.cat(parts)

    def score(self, features: Tensor, prompts: np.ndarray) -> tuple[float, Interval]:
        """`inception_score`; the prompts do not enter."""
        return inception_score(features)


def inception_score(logits: Tensor, seed: int = 0) -> tuple[float, Interval]:
    """Mean over ten splits of logits [N, classes], and its 95 % interval from the splits' spread.

    The images are shuffled first (keyed by `seed`): sets are drawn class by class, and a split of a few classes scores
    far lower. The score grows with the number of images: compare sets of one size. Raises UserError below 20 images.
    """
    count = len(logits)
    if count < 2 * SPLITS:
        raise UserError(
            f"an Inception Score needs {2 * SPLITS} images or more, and thousands to mean anything: {count}"
        )
    order = np.random.Generator(np.random.Philox(key=[seed % 2**64, count])).permutation(count)
    logs = logits.double()[torch.from_numpy(order)].log_softmax(-1)
    scores = []
    for i in range(SPLITS):
        part = logs[i * count // SPLITS : (i + 1) * count // SPLITS]
        of_all = part.logsumexp(0) - np.log(len(part))
        scores.append(float((part.exp() * (part - of_all)).sum(-1).mean().exp()))
    value, half = float(np.mean(scores)), T95 * float(np.std(scores, ddof=1)) / SPLITS**0.5
    return value, (value - half, value + half)


def checked(name: str, place: str | None) -> Path:
    """The converted file at `place`, whose header has the classes of scorer `name`. Raises UserError."""
    kind = TV if name == TV.name else TF
    path = converted(name, kind.source, place)
    if header(path).shapes.get("fc.weight", [])[:1] != [kind.classes]:
        raise UserError(
            f"{path} holds other weights than this scorer's (no {kind.classes} classes); convert {kind.source}"
        )
    return path


def torchvision(
    *, place: str | None, device: torch.device | str, dtype: torch.dtype, cache_dir: str | None
) -> Inception:
    """`inception-tv` from converted weights at `place`."""
    return _opened(TV, place, device, dtype)


def tensorflow(
    *, place: str | None, device: torch.device | str, dtype: torch.dtype, cache_dir: str | None
) -> Inception:
    """`inception-tf` from converted weights at `place`."""
    return _opened(TF, place, device, dtype)


def _opened(kind: Kind, place: str | None, device: torch.device | str, dtype: torch.dtype) -> Inception:
    path = checked(kind.name, place)
    with torch.device("meta"):
        network = InceptionV3(kind)
    fill(network, from_published(read(path)), path)
    fingerprint = f"{kind.name} {checksum(path)} {kind.preprocessing} {dtype}"
    return Inception(network.to(device, dtype).eval(), kind, fingerprint)
