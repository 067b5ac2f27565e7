"""Encoded pairs in memory, with encodings made by hand."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dpo.data import kept as module
from dpo.data.batch import Decoding, PairBatch
from dpo.data.kept import Kept, keeping
from dpo.data.order import Place
from dpo.settings.config import Data, Runtime

PLAIN = Decoding(8, seed=0)


def memory(pairs=2, free=1 << 30, decoding=PLAIN):
    return Kept(pairs, pairs, decoding, free)


def encoded(*indices, shift=0.0, bad=()):
    """A micro-batch of these pairs and its encoding, a function of the index alone but for `shift`."""
    index = torch.tensor(indices)
    usable = torch.tensor([float(i not in bad) for i in indices])
    batch = PairBatch(
        keys=index + 100,
        draws=torch.zeros(len(index), dtype=torch.int64),
        prob=torch.where(usable > 0, 0.75, 0.5),
        usable=usable,
        captions=[f"caption {i}" for i in indices],
        dropped=torch.zeros(len(index), dtype=torch.bool),
        micro=torch.stack([index, index + 50]).view(-1, 1).repeat(1, 6),
        position=0,
        epoch=0,
        pixels=torch.zeros(2 * len(index), 3, 8, 8, dtype=torch.uint8),
        bad=tuple((i + 100, f"image {i} is broken") for i in indices if i in bad),
        indices=list(indices),
    )
    both = torch.cat([index, index + 50]).view(-1, 1, 1, 1).expand(-1, 4, 2, 2).float()
    hidden = index.view(-1, 1, 1).expand(-1, 3, 5).float().bfloat16()
    return batch, both + shift, both + 0.5, (hidden, None, None)


def test_a_batch_comes_back_in_any_order_once_all_were_seen_twice_and_came_out_equal():
    kept = memory()
    kept.put(*encoded(0, 1))
    assert not kept.has([1, 0], [1, 1]), "nothing was encoded twice yet"
    kept.put(*encoded(1, 0))
    assert kept.has([1, 0], [3, 3]) and not kept.has([1, 2], [3, 3])
    batch, (expected, mean, std, text) = kept.batch(Place(8, [1, 0], [3, 3])), encoded(1, 0)
    assert batch.pixels is None and (batch.position, batch.epoch, batch.draws.tolist()) == (8, 3, [3, 3])
    for name in ("keys", "prob", "usable", "micro", "dropped"):
        assert torch.equal(getattr(batch, name), getattr(expected, name)), name
    assert torch.equal(batch.latent_mean, mean) and torch.equal(batch.latent_std, std)
    assert torch.equal(batch.text[0], text[0]) and batch.captions == expected.captions
    assert (kept.take(), kept.take()) == (2, 0)


def test_a_mask_comes_back_with_its_caption():
    def masked(*indices, shift=0):
        batch, mean, std, (hidden, _, _) = encoded(*indices)
        return batch, mean, std, (hidden, None, torch.arange(3) <= batch.keys[:, None] - 100 + shift)

    kept = memory()
    for indices in ((0, 1), (1, 0)):
        kept.put(*masked(*indices))
    batch = kept.batch(Place(8, [1, 0, 1], [3, 3, 3]))
    hidden, pooled, mask = batch.text
    assert pooled is None and mask.dtype == torch.bool and mask.sum(1).tolist() == [2, 1, 2]
    assert torch.equal(hidden, encoded(1, 0, 1)[3][0])
    kept.put(*masked(0, 1, shift=1))
    assert kept.full, "another mask of the same caption is another encoding"


def test_a_hole_is_remembered_with_its_reason():
    kept = memory()
    for _ in range(2):
        kept.put(*encoded(0, 1, bad=(1,)))
    batch = kept.batch(Place(0, [0, 1], [1, 1]))
    assert (batch.usable.tolist(), batch.prob.tolist()) == ([1.0, 0.0], [0.75, 0.5])
    assert batch.bad == ((101, "image 1 is broken"),)


def test_a_hole_made_after_decoding_is_not_kept():
    kept = memory()
    for _ in range(3):
        batch, *encoding = encoded(0, 1, bad=(1,))
        kept.put(replace(batch, bad=()), *encoding)
    kept.put(*encoded(0, 1))
    kept.put(*encoded(0, 1))
    assert kept.batch(Place(0, [1], [1])).usable.tolist() == [1.0]


def test_an_image_that_comes_or_goes_leaves_what_was_kept_first():
    kept = memory()
    for bad, shift in (((), 0.0), ((1,), 9.0), ((), 0.0), ((), 0.0)):
        kept.put(*encoded(0, 1, bad=bad, shift=shift if bad else 0.0) if not bad else encoded(1, bad=bad, shift=shift))
    assert kept.has([0, 1], [1, 1]) and kept.batch(Place(0, [1], [1])).usable.tolist() == [1.0]


def test_nothing_is_kept_where_encoding_again_gives_other_bits(caplog):
    kept = memory()
    kept.put(*encoded(0, 1))
    kept.put(*encoded(0, 1, shift=1e-7 * 50))
    assert kept.full and not kept.has([0, 1], [1, 1]) and caplog.text.count("no longer kept") == 1
    kept.put(*encoded(0, 1))
    assert not kept.has([0, 1], [1, 1])


def test_what_was_promised_is_given_after_that_too():
    kept = memory()
    kept.put(*encoded(0, 1))
    kept.put(*encoded(0, 1))
    assert kept.has([0, 1], [1, 1])
    kept.put(*encoded(0, 1, shift=1.0))
    assert not kept.has([0, 1], [2, 2]) and torch.equal(
        kept.batch(Place(0, [0, 1], [1, 1])).latent_mean, encoded(0, 1)[1]
    )


@pytest.mark.parametrize("flip, fits", [(False, True), (True, False)])
def test_the_whole_set_must_fit_a_share_of_the_free_memory(caplog, flip, fits):
    caplog.set_level("INFO")
    a_pair = 2 * 2 * 4 * 2 * 2 * 4 + 3 * 5 * 2  # mean and std of two images in fp32, a caption in bf16
    kept = memory(pairs=2, free=4 * 2 * a_pair, decoding=replace(PLAIN, flip=flip))
    for _ in range(3):
        kept.put(*encoded(0, 1))
    assert kept.full == (not fits) and len(caplog.messages) == 1
    assert ("kept from their first use" if fits else "python -m dpo.prepare") in caplog.text


def test_batches_of_other_pairs_are_not_kept():
    kept = memory()
    batch, *encoding = encoded(0, 1)
    kept.put(replace(batch, indices=None), *encoding)
    kept.put(replace(batch, indices=None), *encoding)
    assert not kept.has([0, 1], [1, 1])


def test_what_has_not_arrived_from_the_device_is_kept_later(monkeypatch):
    arrived = []
    monkeypatch.setattr(module, "_arrival", lambda x: lambda: bool(arrived))
    kept = memory()
    kept.put(*encoded(0, 1))
    kept.put(*encoded(0, 1))
    assert not kept.has([0, 1], [1, 1])
    arrived.append(True)
    kept.put(*encoded(0, 1))
    assert kept.has([0, 1], [1, 1])


@pytest.mark.parametrize("vae_batch, made", [(4, False), (3, True), (6, True), (8, True)])
def test_parts_of_different_sizes_are_not_kept(caplog, vae_batch, made):
    """Their encodings differ in the last bits."""
    caplog.set_level("INFO")
    runtime = Runtime(keep_encoded="on", vae_batch=vae_batch)
    assert (keeping(Data(resolution=8), runtime, Source(), 3, 9) is not None) == made
    assert ("does not divide the 6 images" in caplog.text) != made


class Source:
    sides = 2

    def __len__(self):
        return 3

    def caption_keys(self):
        return np.array([7, 7, 8])


@pytest.mark.parametrize(
    "data, wanted, ahead, made",
    [({}, "on", 4, True), ({}, "on", 3, False), ({}, "off", 4, False), ({"crop": "random"}, "off", 4, False)],
)
def test_pairs_are_kept_where_they_come_twice(caplog, data, wanted, ahead, made):
    caplog.set_level("INFO")
    kept = keeping(Data(resolution=8, caption_dropout=0.1, **data), Runtime(keep_encoded=wanted), Source(), 3, ahead)
    assert (kept is not None) == made and (kept is None or (kept.pairs, kept.captions) == (3, 3))
    assert ("crop = random" in caplog.text) == bool(data)
