"""Stores with buckets: latents of several shapes are read back as the images give them, whatever happened meanwhile."""

from dataclasses import replace

import pytest
import torch

from dpo.common.errors import UserError
from dpo.data.buckets import find
from dpo.data.order import Order
from dpo.data.pairs import ImageRef
from dpo.data.store import fill
from dpo.data.store.files import NOWHERE, open_shard
from dpo.data.store.parts import has_buckets
from dpo.data.store.store import merge, open_store, verify
from tests.help.reading import stream
from tests.help.stores import CFG, SETTINGS, Encoders, Synthetic, png, task

SHAPED = {"settings": SETTINGS | {"buckets": 1, "vae_scale": 1}, "bad_image_limit": 0.5, "pairs_per_shard": 5}
DATA = replace(CFG, buckets=True)
SIZES = ((8, 8), (20, 8), (8, 20), (9, 8))  # (width, height) of the other image; the preferred one is square


class Shaped(Synthetic):
    def __getitem__(self, index):
        pair = super().__getitem__(index)
        if pair.lose.data == b"broken":
            return pair
        return replace(pair, lose=ImageRef(pair.lose.uid, png(index % 256, SIZES[index % len(SIZES)])))


class Seeing(Encoders):
    """Latents [N, 4, H, W]: the first colour of each pixel. It is interrupted in its call of that number."""

    def __init__(self, interrupted: int = 0) -> None:
        super().__init__(torch.float32)
        self.left = interrupted

    def images(self, pixels):
        self.left -= 1
        if not self.left:
            raise KeyboardInterrupt
        mean = pixels[:, :1].float().expand(-1, 4, -1, -1).contiguous()
        return mean, mean / 2


def equal_to_images(folder, source, n):
    """The store's micro-batches are those of the images, hole for hole."""
    store, seen = open_store(folder, DATA), set()
    made = []
    for pairs in (store, source):
        order = Order(3, 5, 4, 5 + 3 * 9, update=9, buckets=find(DATA, 1, pairs))
        made.append(list(stream(pairs, DATA, order, resolution=8)))
    for ours, other in zip(*made, strict=True):
        for name in ("keys", "draws", "usable", "micro"):
            assert torch.equal(getattr(ours, name), getattr(other, name)), name
        assert (ours.captions, ours.position, ours.last) == (other.captions, other.position, other.last)
        usable = other.usable.repeat(2).view(-1, 1, 1, 1)
        assert torch.equal(ours.latent_mean, usable * other.pixels[:, :1].float().expand(-1, 4, -1, -1))
        seen.add(tuple(ours.latent_mean.shape[2:]))
    assert len(store) == n and seen == {(8, 8), (6, 10), (10, 6)}


def test_latents_of_several_shapes_after_a_kill_and_a_mended_image(tmp_path):
    broken, whole = Shaped(21, broken=(4, 9)), Shaped(21)
    with pytest.raises(KeyboardInterrupt):
        fill.fill(task(tmp_path / "store", broken, Seeing(interrupted=5), **SHAPED))
    assert fill.fill(task(tmp_path / "store", broken, Seeing(), **SHAPED)) and verify(tmp_path / "store") == []
    shard = open_shard(tmp_path / "store" / "000000.safetensors")
    assert shard["image_mean"].dim() == 1 and NOWHERE in shard["pair_lose"].tolist()
    equal_to_images(tmp_path / "store", broken, 21)
    assert fill.fill(task(tmp_path / "store", whole, Seeing(), **SHAPED)), "two images are readable now"
    equal_to_images(tmp_path / "store", whole, 21)


def test_an_image_in_pairs_of_two_shapes_is_kept_in_both(tmp_path):
    source = Shaped(4, shared=1)  # each preferred image is in two pairs
    assert fill.fill(task(tmp_path, source, Seeing(), **SHAPED))
    store = open_store(tmp_path, DATA)
    sizes = find(DATA, 1, store).sizes
    assert find(replace(DATA, resolution=16), 1, store).sizes == sizes, "whatever the model's own resolution is"
    wanted = {
        (image.uid, number) for number, pair in zip(store.contents.bucket, source) for image in (pair.win, pair.lose)
    }
    assert store.contents.images.starts[-1] == len(wanted) > len({uid for uid, _ in wanted})
    assert [sizes[number] for number in store.contents.bucket] == [(8, 8), (6, 10), (10, 6), (8, 8)]


def test_parts_are_merged_and_squares_are_not_mixed_with_shapes(tmp_path):
    source = Shaped(21)
    for number, (first, last) in enumerate(((0, 10), (10, 21))):
        fill.fill(task(tmp_path / str(number), source, Seeing(), first=first, last=last, **SHAPED))
    merge(tmp_path / "both", [tmp_path / "0", tmp_path / "1"])
    equal_to_images(tmp_path / "both", source, 21)
    assert has_buckets(tmp_path / "both") and has_buckets(tmp_path / "0") and not has_buckets(tmp_path / "nowhere")
    fill.fill(task(tmp_path / "squares", source))
    assert not has_buckets(tmp_path / "squares")
    with pytest.raises(UserError, match="differ in buckets"):
        merge(tmp_path / "mixed", [tmp_path / "0", tmp_path / "squares"])
    with pytest.raises(UserError, match="holds squares: prepare with --buckets, or leave it out"):
        open_store(tmp_path / "squares", DATA)
    with pytest.raises(UserError, match="squares holds squares: leave --buckets out, or name another --store"):
        fill.fill(task(tmp_path / "squares", source, Seeing(), **SHAPED))
    with pytest.raises(UserError, match="0 holds shapes: give --buckets, or name another --store"):
        fill.fill(task(tmp_path / "0", source))
    with pytest.raises(UserError, match="in steps of 1 pixels, this model needs 4"):
        find(DATA, 4, open_store(tmp_path / "both", DATA))
