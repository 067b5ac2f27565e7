"""A replay is the run: its figures bit for bit on every path, and a planted pair is found."""

import numpy as np
import pytest
from PIL import Image

from dpo import prepare
from dpo.replaying import work
from dpo.replaying.pairs import keys_between, measured
from dpo.train import train_step
from tests.help.running import advance, leave, make_run
from tests.help.worlds import make_folders

LORA = ["--lora", "--lora-dropout", "0.3", "--caption-dropout", "0.5"]
MORE = ["--optimizer", "adamw8bit", "--ema", "0.9", "--scheduler", "cosine"]


def replayed(run, update, tmp_path):
    leave(run, 5, 3)
    return work.replay(work.Asked(run.output, update, tmp_path / "found"), train_step)


@pytest.mark.parametrize(
    ("flags", "update"),
    [
        (["--method", "dde", "--accumulation", "2"], 4),
        (LORA, 2),
        pytest.param(MORE, 4, marks=pytest.mark.slow),
        pytest.param(["--precision", "bf16"], 4, marks=pytest.mark.slow),
    ],
    ids=["dde, from a checkpoint", "lora with dropout, from the start", "8-bit, averaged, cosine", "bf16"],
)
def test_figures_are_those_of_the_run(world, tmp_path, flags, update):
    flags = ["--batch-size", "2", "--steps", "6", "--learning-rate", "1e-4", *flags]
    found = replayed(make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags), update, tmp_path)
    assert found["from"]["step"] == (3 if update == 4 else 0)
    assert found["compared"] == {"updates": found["from"]["updates"], "first": None}
    assert len(found["figures"]) > 20


def test_figures_of_a_recorded_reference_are_those_of_the_run(world, tmp_path):
    words = ["--model", world("sd15"), "--data", world("pairs"), "--dtype", "fp32", "--workers", "0", "--seed", "3"]
    assert prepare.main(["--store", str(tmp_path / "store"), "--reference", "--batch-size", "2", *words]) == 0
    flags = ["--reference", "recorded", "--seed", "3", "--batch-size", "2", "--steps", "6"]
    found = replayed(make_run(world("sd15"), str(tmp_path / "store"), tmp_path / "run", *flags), 5, tmp_path)
    assert found["compared"] == {"updates": 2, "first": None}
    assert len(list((tmp_path / "found" / "images").iterdir())) == 4, "decoded from their latents"


def swapped(win, lose):
    """The label the wrong way round."""
    data = win.read_bytes(), lose.read_bytes()
    win.write_bytes(data[1])
    lose.write_bytes(data[0])


def black(win, lose):
    """The preferred image is garbage: black, as a download that failed leaves it."""
    Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(win, quality=95)


@pytest.mark.parametrize(
    ("plant", "high", "place"), [(swapped, "900", 1), (black, "650", 3)], ids=["swapped label", "black image"]
)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))])
def test_a_planted_pair_has_the_largest_share(world, tmp_path, plant, high, place, seed):
    """In the fifth epoch, when the model tells winners from losers, at timesteps where their difference shows.

    A pair with its label the wrong way round comes first of eight. A black winner comes first in most seeds and among
    the first three in all: by then the model has learned some of these pairs by heart.
    """
    folder = make_folders(tmp_path / "pairs", 24, seed)
    plant(folder / "w" / "00007.jpg", folder / "l" / "00007.jpg")
    flags = ["--batch-size", "8", "--seed", str(seed), "--learning-rate", "1e-4", "--beta", "500"]
    flags += ["--window-low", "300", "--window-high", high]
    run = make_run(world("sd15"), str(folder), tmp_path / "run", *flags)
    key = run.source[7].key
    update = next(update for update in range(13, 17) if key in keys_between(run, update, update))
    advance(run, update - 1)
    assert key in [pair.key for pair in measured(run)[:place]]
