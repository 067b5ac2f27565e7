"""What a shard of a store holds while it is made: pairs, new images in one or several shapes, new captions.

Legend: N images of the shard, C channels, h, w of latents. In a store without buckets latents lie as [N, C, h, w]. In
one with buckets they lie one after another without gaps, and `image_end` [N] says where each ends. So do the hidden states
of captions, without their padding, where a family has a mask: `caption_span` [N] says where those of each end.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from dpo.common.errors import UserError
from dpo.data.images import Micro, Size
from dpo.data.pairs import caption_key
from dpo.data.store.files import HIDDEN, LATENTS, POOLED, SPAN, TEXT, Parts, crc

COLUMNS = {
    "pair_key": torch.int64, "pair_win": torch.int64, "pair_lose": torch.int64, "pair_caption": torch.int64,
    "pair_prob": torch.float32, "pair_group": torch.int32, "pair_bucket": torch.int32,
}  # fmt: skip

# Key, win, lose, caption, prob, group, bucket. Win and lose are the images' hashes until the images have rows.
PairRow = tuple[int, int, int, int, float, int, int]


class Encode(Protocol):
    """The encoders: pixels and captions to what is stored, on the CPU and in the store's dtype."""

    @property
    def image_batch(self) -> int:
        """Images encoded at once."""
        ...

    @property
    def text_batch(self) -> int:
        """Captions encoded at once."""
        ...

    def images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """[N, 3, H, W] uint8 -> mean and std of the VAE's posterior [N, C, h, w]."""
        ...

    def captions(self, captions: list[str]) -> Parts:
        """N captions -> hidden [N, S, D], pooled [N, P], and a mask [N, S] bool of the first tokens of each; or None."""
        ...


@dataclass
class Shard:
    """What a shard holds, while it is being made."""

    pairs: list[PairRow] = field(default_factory=list)
    image_keys: list[int] = field(default_factory=list)
    latents: dict[int, tuple[Tensor, ...]] = field(
        default_factory=dict
    )  # image of the shard -> mean, std (and both when mirrored) [C, h, w]
    micro: list[Micro] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)  # image key -> what is wrong
    again: Collection[int] = ()  # keys of images that were unreadable before
    mended: list[int] = field(default_factory=list)  # those of them that are readable now
    files: dict[int, tuple[int, str]] = field(default_factory=dict)  # image key -> `state`, of the bad and `again`
    captions: list[str] = field(default_factory=list)
    _waiting: dict[Size, list[tuple[int, Tensor]]] = field(default_factory=dict)

    def add(self, key: int, pixels: Tensor, micro: Micro, encode: Encode) -> None:
        """Takes the next image, [1 or 2, 3, H, W] uint8, the second mirrored; encodes those of its shape when there are enough."""
        size = micro[-2:]
        alike = self._waiting.setdefault(size, [])
        alike.append((len(self.image_keys), pixels))
        self.image_keys.append(key)
        self.micro.append(micro)
        if len(alike) == encode.image_batch:
            self._encode(size, encode)

    def finish(self, encode: Encode) -> None:
        """Encodes the images that are left."""
        for size in list(self._waiting):
            self._encode(size, encode)

    def _encode(self, size: Size, encode: Encode) -> None:
        numbers, pixels = zip(*self._waiting.pop(size), strict=True)
        found: list[Tensor] = []
        for half in torch.stack(pixels, dim=1):
            found += encode.images(half)
        self.latents |= dict(zip(numbers, zip(*found, strict=True), strict=True))

    def tensors(self, encode: Encode, buckets: bool) -> dict[str, Tensor]:
        """The content of its file. Raises UserError for encodings that are not finite in the store's dtype."""
        columns = list(zip(*self.pairs, strict=True)) or [()] * len(COLUMNS)
        found = {
            name: torch.tensor(values, dtype=dtype)
            for (name, dtype), values in zip(COLUMNS.items(), columns, strict=True)
            if buckets or name != "pair_bucket"
        }
        found["bad_key"] = torch.tensor(list(self.bad), dtype=torch.int64)
        if self.image_keys:
            found |= self._images(buckets)
        if self.captions:
            found |= self._captions(encode)
        for name in (*LATENTS, *TEXT):
            if name in found and not found[name].isfinite().all():
                raise UserError(
                    f"{name.split('_')[0]} encodings are not finite in {found[name].dtype}: prepare with --dtype bf16 or fp32"
                )
        return found

    def _images(self, buckets: bool) -> dict[str, Tensor]:
        rows = [self.latents[number] for number in range(len(self.image_keys))]
        found = {
            "image_key": torch.tensor(self.image_keys, dtype=torch.int64),
            "image_micro": torch.tensor(self.micro, dtype=torch.int32),
            "image_crc": torch.tensor([crc(*row) for row in rows], dtype=torch.int64),
        }
        if buckets:
            found["image_end"] = torch.tensor([row[0].numel() for row in rows], dtype=torch.int64).cumsum(0)
            joined = [torch.cat([value.reshape(-1) for value in values]) for values in zip(*rows, strict=True)]
        else:
            joined = [torch.stack(values) for values in zip(*rows, strict=True)]
        return found | dict(zip(LATENTS, joined))

    def _captions(self, encode: Encode) -> dict[str, Tensor]:
        rows: list[dict[str, Tensor]] = []
        masked = False
        for first in range(0, len(self.captions), encode.text_batch):
            parts = encode.captions(self.captions[first : first + encode.text_batch])
            masked = parts[-1] is not None
            rows += stored(parts)
        found = {name: torch.stack([row[name] for row in rows]) for name in rows[0] if name != HIDDEN or not masked}
        if masked:
            hidden = [row[HIDDEN] for row in rows]
            found |= {HIDDEN: torch.cat(hidden), SPAN: torch.tensor([len(row) for row in hidden]).cumsum(0)}
        texts = [caption.encode("utf-8", "surrogatepass") for caption in self.captions]
        return found | {
            "caption_key": torch.tensor([caption_key(caption) for caption in self.captions], dtype=torch.int64),
            "caption_end": torch.tensor([len(text) for text in texts], dtype=torch.int64).cumsum(0),
            "caption_text": torch.frombuffer(bytearray(b"".join(texts)) or bytearray(1), dtype=torch.uint8).clone(),
            "caption_crc": torch.tensor([crc(*row.values()) for row in rows], dtype=torch.int64),
        }


def stored(parts: Parts) -> list[dict[str, Tensor]]:
    """What is stored of each of some encoded captions, by name: with a mask those hidden states alone that it shows."""
    hidden, pooled, mask = parts
    assert hidden is not None, "every family has hidden states"
    lengths = [hidden.shape[1]] * len(hidden) if mask is None else mask.sum(1).tolist()
    shown = [row[:length].clone() for row, length in zip(hidden, lengths, strict=True)]
    if pooled is None:
        return [{HIDDEN: row} for row in shown]
    return [{HIDDEN: row, POOLED: vector} for row, vector in zip(shown, pooled, strict=True)]
