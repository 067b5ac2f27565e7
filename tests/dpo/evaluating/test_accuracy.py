"""Implicit preference accuracy: the same figure that the training run gives for its held-out pairs."""

import copy

import pytest
import torch

from dpo.common.stats import share_interval
from dpo.evaluating.accuracy import by_side
from dpo.settings.flags import parse
from dpo.training import validation
from tests.help.running import advance, make_run

DRAWS = 3


@pytest.fixture(scope="module")
def run(world, tmp_path_factory):
    """A run that learned something, and measured it on its own training pairs."""
    output = tmp_path_factory.mktemp("accuracy") / "out"
    flags = ["--validation-data", world("pairs"), "--validation-split", "train", "--validation-draws", str(DRAWS)]
    made = make_run(
        world("sd15"),
        world("pairs"),
        output,
        "--learning-rate",
        "3e-4",
        "--batch-size",
        "4",
        *flags,
        "--validate-every",
        "9",
    )
    advance(made, 6)
    return made


@pytest.fixture(scope="module")
def found(world, run):
    config, _ = parse(["--model", world("sd15"), "--data", world("pairs"), "--validation-draws", str(DRAWS)])
    policies = {
        "itself": lambda: make_run(world("sd15"), world("pairs"), run.output).model.denoiser,
        "trained": lambda: copy.deepcopy(run.model.denoiser),
    }
    return {row["side"]: row for row in by_side(config, policies["itself"], policies)}


@pytest.mark.long
def test_a_model_against_itself_is_one_half(found):
    row = found["itself"]
    assert row["accuracy"] == 0.5 and row["interval"][0] < 0.5 < row["interval"][1]
    assert all(value in (0.5, None) for value in row["deciles"]) and row["draws"] == DRAWS


@pytest.mark.long
def test_it_is_the_figure_of_the_run(run, found):
    expected = validation.accuracy(run.step, run.held_out)
    row = found["trained"]
    assert (row["accuracy"], row["pairs"]) == (expected["heldout_accuracy"], expected["heldout_pairs"])
    assert row["interval"] == expected["heldout_interval"] and row["accuracy"] != 0.5
    assert len(row["deciles"]) == 10 and any(value is not None for value in row["deciles"])


def test_pairs_of_one_caption_go_together():
    """60 captions of 8 pairs that are right or wrong together are no 480 pairs; a caption each changes nothing."""
    d, alone = torch.where(torch.arange(480) < 384, -1.0, 1.0), torch.arange(480)
    each = validation.figures(d, alone)
    assert each["heldout_interval"] == list(share_interval(384, 480))
    together = validation.figures(d, alone // 8)
    assert together["heldout_interval"] == pytest.approx(share_interval(48, 60))
    assert {**together, "heldout_interval": None} == {**each, "heldout_interval": None}
