"""Small stores without a model: synthetic pairs and stand-ins for the encoders."""

from __future__ import annotations

import functools
import io
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dpo.common.words import digest
from dpo.data.pairs import ImageRef, Pair, Source, caption_key, pair_key
from dpo.data.store.files import Parts
from dpo.data.store.filling import Filling
from dpo.settings.config import Data

SETTINGS = {"resolution": 8, "flip": False, "dtype": "fp16", "family": "sd", "text_tokens": 3}


CFG = Data(data="store", resolution=8)


@functools.cache
def png(shade: int, size: tuple[int, int] = (8, 8)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (shade, 255 - shade, shade // 2)).save(buffer, "PNG")
    return buffer.getvalue()


@dataclass
class Synthetic:
    """n pairs. Every `shared`-th pair has the preferred image of the pair before; captions repeat after `captions`."""

    n: int
    captions: int = 5
    shared: int = 3
    broken: tuple[int, ...] = ()  # pairs whose other image cannot be decoded
    ties: tuple[int, ...] = ()
    start: int = 0
    groups: np.ndarray | None = None
    window: int | None = None
    sides: int = 2
    summary: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.prob = np.ones(self.n, dtype=np.float32)
        self.prob[list(self.ties)] = 0.5
        self.summary = {"rows": self.n, "pairs": self.n}
        self.fingerprint = digest("synthetic", str(self.n), str(self.start), str(self.captions))

    def __len__(self) -> int:
        return self.n

    def caption_keys(self) -> np.ndarray:
        texts = (f"caption {(index + self.start) % self.captions} ä" for index in range(self.n))
        return np.array([caption_key(text) for text in texts], dtype=np.int64)

    def __getitem__(self, index: int) -> Pair:
        i = index + self.start
        first = i - 1 if i % self.shared == 0 and i else i
        win = ImageRef(f"win {first}", png(first % 256))
        lose = ImageRef(f"lose {i}", b"broken" if index in self.broken else png((i + 100) % 256))
        caption = f"caption {i % self.captions} ä"
        return Pair(pair_key(win.uid, lose.uid, caption), caption, win, lose, float(self.prob[index]))


@dataclass
class Encoders:
    """Stand-ins: latents [N, 4, 2, 2] from the pixels, text [N, 3, 2] from the characters.

    masked: captions have one to three tokens. `calls` counts what was encoded.
    """

    dtype: torch.dtype = torch.float16
    image_batch: int = 4
    text_batch: int = 3
    pooled: bool = False
    masked: bool = False
    calls: dict = field(default_factory=lambda: {"images": 0, "captions": 0})

    def images(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        self.calls["images"] += len(pixels)
        mean = pixels.float().mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, 4, 2, 2) / 255
        return mean.to(self.dtype).contiguous(), (mean / 10).to(self.dtype).contiguous()

    def captions(self, captions: list[str]) -> Parts:
        self.calls["captions"] += len(captions)
        hidden = torch.tensor([[len(c) + 1, sum(c.encode())] * 3 for c in captions], dtype=self.dtype).view(-1, 3, 2)
        pooled = hidden[:, 0] if self.pooled else None
        if not self.masked:
            return hidden, pooled, None
        mask = torch.arange(3) <= torch.tensor([[sum(c.encode()) % 3] for c in captions])
        return hidden * mask[..., None], pooled, mask


def task(folder: Path, source: Source, encode: Encoders | None = None, **changes) -> Filling:
    made = Filling(folder, "synthetic", source, SETTINGS, encode or Encoders(), pairs_per_shard=8)
    return replace(made, **changes)
