"""dpo.training.best: which half of the held-out pairs chooses, what is better, and what is refused."""

import numpy as np
import pytest
import torch

from dpo.common.errors import UserError
from dpo.settings.config import Config, change
from dpo.training import best
from dpo.training.best import Best, choosing_half

PAIRS = np.arange(1000, 1200, dtype=np.int64)


def test_half_of_the_pairs_choose_and_it_depends_on_the_pairs_alone():
    alone = choosing_half(PAIRS, np.zeros_like(PAIRS), "pair")
    assert alone.sum() == 100
    turned = choosing_half(PAIRS[::-1].copy(), np.zeros_like(PAIRS), "pair")
    assert np.array_equal(turned[::-1], alone), "whatever their order"


def test_captions_stay_whole_where_the_halves_come_out_even():
    captions = PAIRS // 10
    whole = choosing_half(PAIRS, captions, "auto")
    assert not set(captions[whole]) & set(captions[~whole]) and 80 <= whole.sum() <= 120
    assert np.array_equal(whole, choosing_half(PAIRS, captions, "caption"))
    one = np.zeros_like(PAIRS)
    assert np.array_equal(choosing_half(PAIRS, one, "auto"), choosing_half(PAIRS, one, "pair")), "of one caption"
    assert choosing_half(PAIRS, one, "caption").all(), "which is then refused"


def figures(accuracy, difference):
    return {"choosing_accuracy": accuracy, "choosing_difference": difference}


@pytest.mark.parametrize(
    ("accuracy", "difference", "beaten"),
    [(0.75, 0.1, True), (0.625, -9.0, False), (0.7, -0.3, True), (0.7, -0.1, False), (0.7, -0.2, True)],
)
def test_more_is_better_then_the_lower_difference_then_the_later(accuracy, difference, beaten):
    there = Best(torch.ones(4, dtype=torch.bool), "", None)
    assert there.is_beaten_by(figures(0.0, 9.0)), "by anything at first"
    there.take(5, figures(0.7, -0.2))
    assert there.is_beaten_by(figures(accuracy, difference)) is beaten


def test_patience():
    there = Best(torch.ones(4, dtype=torch.bool), "", 2, waited=1)
    assert not there.ended
    there.waited = 2
    assert there.ended and not Best(there.choosing, "", None, waited=99).ended


@pytest.mark.parametrize(
    ("steps", "every", "patience", "said"),
    [
        (100, 100, None, "this run of 100 updates has one: lower --validate-every 100"),
        (100, 20, 4, "--patience 4 never ends a run of 5 held-out accuracies"),
        (100, 20, 3, None),
        (100, 50, None, None),
    ],
)
def test_what_could_not_choose_is_refused(steps, every, patience, said):
    config = change(Config(), keep_best=True, validate_every=every, patience=patience)
    if said is None:
        best.check(config, [1], steps)
        return
    with pytest.raises(UserError, match=said):
        best.check(config, [1], steps)
    best.check(change(config, keep_best=False), None, steps)


def test_without_held_out_pairs_it_is_refused():
    with pytest.raises(UserError, match="no pairs are held out: give --validation-data or"):
        best.check(change(Config(), keep_best=True, validate_every=1), None, 100)
