"""dpo.data.batches: the same micro-batches in the same order from every kind of source."""

import dataclasses

import pytest
import torch

from dpo.data.batch import Decoding
from dpo.data.batches import batches, held_out_batches
from dpo.data.loader import Reading
from dpo.data.order import Order, run_order, stored_order
from dpo.data.pairs import Subset
from dpo.data.store import fill
from dpo.data.store.store import open_store
from dpo.settings.config import Data
from tests.help.stores import CFG, Encoders, Synthetic, task

PLAIN = Decoding(8, seed=3, caption_dropout=0.4)
SAME = ("keys", "draws", "prob", "usable", "micro")


def sources(tmp_path):
    """The same pairs as images, as a store, and as part of each."""
    pairs = Synthetic(17, ties=(2,))
    fill.fill(task(tmp_path, pairs))
    store = open_store(tmp_path, dataclasses.replace(CFG, ties="keep"))
    some = torch.arange(3, 14).numpy()
    return {"whole": (pairs, store), "part": (Subset(pairs, some), Subset(store, some))}


def check_same(ours, others):
    ours, others = list(ours), list(others)
    assert len(ours) == len(others) > 0
    for mine, other in zip(ours, others, strict=True):
        assert all(torch.equal(getattr(mine, name), getattr(other, name)) for name in SAME)
        assert (mine.captions, mine.position, mine.epoch) == (other.captions, other.position, other.epoch)


@pytest.mark.parametrize("which", ["whole", "part"])
@pytest.mark.parametrize("order", [Order(3, 0, 4, stop=40), Order(3, 9, 5, stop=33, rank=1, world=2)])
def test_a_run_has_the_same_batches_from_images_and_from_a_store(tmp_path, which, order):
    images, store = sources(tmp_path)[which]
    ours, others = (batches(source, order, PLAIN, Reading()) for source in (images, store))
    check_same(ours, others)


@pytest.mark.parametrize("which", ["whole", "part"])
def test_the_order_is_that_of_the_seed(tmp_path, which):
    images, _ = sources(tmp_path)[which]
    order = Order(5, 0, 4, stop=len(images))
    found = [key for batch in batches(images, order, PLAIN, Reading()) for key in batch.keys.tolist()]
    assert found == [images[i].key for place in run_order(images, order) for i in place.indices]
    assert sorted(found) == sorted(images[i].key for i in range(len(images)))


@pytest.mark.parametrize("which", ["whole", "part"])
def test_held_out_pairs_come_as_they_are_stored_with_all_their_captions(tmp_path, which):
    images, store = sources(tmp_path)[which]
    check_same(*(held_out_batches(source, 4, 8, Reading()) for source in (images, store)))
    for source in (images, store):
        found = list(held_out_batches(source, 4, 8, Reading()))
        assert [len(batch) for batch in found] == [len(place.indices) for place in stored_order(source, 4)]
        assert [caption for batch in found for caption in batch.captions] == [
            source[i].caption for i in range(len(source))
        ]
        assert all(not batch.draws.any() for batch in found)


def test_recorded_errors_need_a_store():
    with pytest.raises(AssertionError, match="belong to a prepared store"):
        batches(Synthetic(4), Order(0, 0, 2), PLAIN, Reading(), recorded=object())


def test_images_come_as_pixels_and_a_store_as_latents_and_text(tmp_path):
    images, store = sources(tmp_path)["whole"]
    pixels, latents = (next(batches(source, Order(0, 0, 4), PLAIN, Reading())) for source in (images, store))
    assert pixels.pixels.shape == (8, 3, 8, 8) and pixels.latent_mean is None and pixels.text is None
    assert (
        latents.pixels is None
        and latents.latent_mean.shape == (8, 4, 2, 2)
        and latents.text[0].dtype == Encoders().dtype
    )


def test_the_settings_are_taken_over():
    """Values that are nobody's default: one that was left out would show."""
    data = Data(
        resolution=96,
        crop="random",
        flip=True,
        caption_dropout=0.25,
        workers=3,
        prefetch=7,
        on_bad_image="stop",
        bad_image_limit=0.5,
    )
    assert Decoding.of(data, 11) == Decoding(96, 11, "random", True, 0.25)
    assert Reading.of(data) == Reading(3, 7, "stop", 0.5)
    assert Reading.of(Data()) == Reading(workers=-1)
    with pytest.raises(AssertionError, match="resolution is decided"):
        Decoding.of(Data(), 11)
