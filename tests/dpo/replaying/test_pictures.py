"""The images of a pair as the run saw them."""

import itertools

import numpy as np
import pytest

from dpo.prepare import main as prepare
from dpo.replaying.pairs import measured
from dpo.replaying.pictures import pictures, places
from tests.help.flow import SMALL, TRAINED
from tests.help.running import make_run
from tests.help.worlds import make_folders

FLAGS = ["--batch-size", "3", "--flip"]


def test_images_are_those_of_the_batch(world, tmp_path):
    folder = make_folders(tmp_path / "pairs", 6, odd_sizes=True)
    run = make_run(world("sd15"), str(folder), tmp_path / "run", *FLAGS, "--crop", "random")
    run.position = 3 * 5  # in the third epoch, whose crops and flips are others than those of the first
    found = measured(run, top=1)
    batches = run.batches()
    (batch,) = itertools.islice(batches, 1)
    batches.close()
    for pair in found:
        row = batch.keys.tolist().index(pair.key)
        win, lose = (np.asarray(image).transpose(2, 0, 1) for image in pictures(run, pair))
        assert (win == batch.pixels[row].numpy()).all() and (lose == batch.pixels[row + 3].numpy()).all()
        where, caption = places(run, pair), run.source[pair.index].caption
        assert where["win"].startswith(str(folder / "w")) and caption == pair.caption


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd15", *TRAINED])
def test_images_of_a_store_are_decoded(world, tmp_path, kind):
    folder, store = make_folders(tmp_path / "pairs", 6), tmp_path / "store"
    words = ["--model", world(kind), "--data", str(folder), "--store", str(store), "--workers", "0"]
    small = SMALL if kind in TRAINED else ()
    assert prepare([*words, "--flip", *small]) == 0
    run = make_run(world(kind), str(store), tmp_path / "run", *FLAGS, *small)
    pair = measured(run, top=1)[0]
    win, lose = pictures(run, pair)
    side = run.config.data.resolution
    assert win.size == lose.size == (side, side) and np.asarray(win).std() > 0
    assert places(run, pair)["win"].startswith("image ")
