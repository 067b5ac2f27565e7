"""dpo.data.store.reader: rows of the store put together as micro-batches, dropout, mirror images, recorded errors, the
thread.
"""

import threading
from dataclasses import replace

import numpy as np
import pytest
import torch

from csrc_triton.philox import Stream, uniform
from dpo.data.batch import Decoding
from dpo.data.order import Order, Place, run_order, stored_order
from dpo.data.store import fill
from dpo.data.store.files import DamagedStore
from dpo.data.store.reader import _Reader, read
from dpo.data.store.recorded import Piece, RecordedErrors
from dpo.data.store.store import open_store
from tests.help.stores import CFG, Encoders, Synthetic, task

PLAIN = Decoding(8, seed=3)


@pytest.fixture
def store(tmp_path):
    fill.fill(task(tmp_path, Synthetic(20, broken=(4,), ties=(7,)), Encoders(torch.float32), bad_image_limit=0.2))
    return open_store(tmp_path, replace(CFG, ties="keep", label_smoothing=0.1))


def batch(store, decoding, indices, epochs, recorded=None):
    return _Reader(store, decoding, recorded).batch(Place(0, indices, epochs))


def test_a_batch_holds_the_pairs_that_it_was_asked_for(store):
    found = batch(store, PLAIN, [9, 3, 9], [0, 5, 2])
    assert found.keys.tolist() == [store[i].key for i in (9, 3, 9)] and found.draws.tolist() == [0, 5, 2]
    assert found.captions == [store[i].caption for i in (9, 3, 9)] and found.epoch == 0 and found.position == 0
    assert torch.equal(found.latent_mean[[0, 3]], found.latent_mean[[2, 5]])
    assert not torch.equal(found.latent_mean[0], found.latent_mean[1])


def test_a_pair_without_a_usable_image_is_a_hole_and_a_tie_keeps_its_probability(store):
    found = batch(store, PLAIN, [4, 7, 8], [0, 0, 0])
    assert found.usable.tolist() == [0, 1, 1]
    assert found.prob.tolist() == [0.5, 0.5, pytest.approx(0.9)]  # smoothing is for certain labels only
    assert not found.latent_mean[[0, 3]].any() and found.latent_mean[[1, 4]].any()


def test_a_dropped_caption_is_the_empty_one_in_words_and_in_encoding(store):
    indices = list(range(20))
    found = batch(store, replace(PLAIN, caption_dropout=0.5), indices, [1] * 20)
    drop = uniform(found.keys, found.draws, Stream.DROPOUT, PLAIN.seed, 1)[:, 0] < 0.5
    assert 0 < int(drop.sum()) < 20 and torch.equal(found.dropped, drop)
    assert found.captions == ["" if gone else store[i].caption for i, gone in zip(indices, drop.tolist(), strict=True)]
    assert torch.equal(found.text[0], Encoders(torch.float32).captions(found.captions)[0])
    assert found.captions != batch(store, replace(PLAIN, caption_dropout=0.5), indices, [2] * 20).captions
    kept = batch(store, PLAIN, indices, [1] * 20)
    assert "" not in kept.captions and not kept.dropped.any()


def test_recorded_errors_come_with_their_draws(store):
    """Two draws of every pair: epoch 3 uses draw 1, and dropout and mirror images follow the draw, not the epoch."""
    errors = torch.arange(80.0).view(2, 20, 2)
    record = RecordedErrors(((Piece(0, 20, 0, 2), errors),), 2, seed=3, timesteps=torch.arange(10), inside=None)
    dropping = replace(PLAIN, caption_dropout=0.5)
    found = batch(store, dropping, [5, 11], [3, 0], record)
    assert found.draws.tolist() == [1, 0] and found.epoch == 3
    assert torch.equal(found.recorded, torch.stack([errors[1, 5], errors[0, 11]], dim=1))
    assert found.captions == batch(store, dropping, [5, 11], [1, 0]).captions
    assert batch(store, PLAIN, [5], [0]).recorded is None


def test_places_are_read_in_order_and_the_last_batch_may_be_short(store):
    places = list(run_order(store, Order(1, 5, 8, stop=30)))
    found = list(read(store, places, PLAIN))
    assert [(b.position, b.keys.tolist(), b.draws.tolist()) for b in found] == [
        (place.position, [store[i].key for i in place.indices], place.epochs) for place in places
    ]
    plain = list(read(store, stored_order(store, 6), PLAIN))
    assert [len(b) for b in plain] == [6, 6, 6, 2] and [b.position for b in plain] == [0, 6, 12, 18]
    assert [key for b in plain for key in b.keys.tolist()] == [store[i].key for i in range(20)]


def test_damage_is_raised_to_the_caller_and_the_thread_ends(store):
    path = store.contents.shards[0]
    whole = bytearray(path.read_bytes())
    mean = np.frombuffer(store.contents.shard(0)["image_mean"].numpy().tobytes(), dtype=np.uint8).tobytes()
    whole[bytes(whole).index(mean)] ^= 1
    path.write_bytes(whole)
    store.contents._opened.cache_clear()
    with pytest.raises(DamagedStore, match="was altered"):
        list(read(store, stored_order(store, 4), PLAIN))
    assert not [thread for thread in threading.enumerate() if thread.name == "dpo-read-ahead"]


def test_closing_ends_the_thread_without_reading_the_rest(store):
    asked = []
    stream = read(store, (asked.append(i) or Place(i, [i % 20], [0]) for i in range(10**6)), PLAIN)
    next(stream)
    stream.close()
    assert len(asked) < 20
    assert not [thread for thread in threading.enumerate() if thread.name == "dpo-read-ahead"]
