"""dpo.training.choice: what is reported has no say in the choice, and all processes choose alike (runs: test_keep_best.py)."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from dpo.training import choice
from dpo.training.best import Best

HALF = torch.tensor([True] * 8 + [False] * 8)


def measured(monkeypatch, best, right, *, done=1, said=None, liked=None):
    """`measure` where `right` of each half's 8 pairs are ranked as people did; said: the first process's answer.

    liked [16] bool: of images without a partner.
    """
    d = torch.cat([torch.where(torch.arange(8) < count, -1.0, 1.0) for count in right])
    monkeypatch.setattr(choice.validation, "differences", lambda step, pairs: d[None])
    processes = SimpleNamespace(objects=lambda own: [own if said is None else said, own])
    run = SimpleNamespace(
        updater=SimpleNamespace(averaged=nullcontext, ema=[]),
        best=best,
        processes=processes,
        step=None,
        done=done,
        total=9,
    )
    labelled = torch.ones(16, dtype=torch.bool)
    held = SimpleNamespace(
        single=liked is not None,
        liked=labelled if liked is None else liked,
        labelled=labelled,
        captions=torch.arange(16),
    )
    return choice.measure(run, held)


def test_one_half_chooses_and_the_other_is_reported(monkeypatch):
    best = Best(HALF, "", None)
    figures, better = measured(monkeypatch, best, (6, 2))
    assert better and best.step == 1 and best.figures == figures
    assert (figures["choosing_accuracy"], figures["choosing_pairs"]) == (0.75, 8)
    assert (figures["heldout_accuracy"], figures["heldout_pairs"]) == (0.25, 8)
    figures, better = measured(monkeypatch, best, (5, 8), done=2)
    assert not better and (best.step, best.waited) == (1, 1), "however good the other half is"


def test_without_keep_best_all_pairs_are_reported(monkeypatch):
    figures, better = measured(monkeypatch, None, (6, 2))
    assert not better and figures["heldout_pairs"] == 16 and "choosing_accuracy" not in figures


@pytest.mark.parametrize("said", [True, False])
def test_the_first_process_decides(monkeypatch, said):
    best = Best(HALF, "", 1, step=1, figures={"choosing_accuracy": 0.5, "choosing_difference": 0.0})
    _, better = measured(monkeypatch, best, (8, 8) if not said else (0, 0), done=2, said=said)
    assert better is said and best.step == (2 if said else 1) and best.ended is not said


def test_naming_the_commoner_label_is_not_chosen(monkeypatch):
    """Six of eight images of each half are liked: "liked" for all is right in six, and worth one half."""
    best, liked = Best(HALF, "", None), torch.tensor([True] * 6 + [False] * 2).repeat(2)
    named, better = measured(monkeypatch, best, (6, 6), liked=liked)
    assert better and named["choosing_accuracy"] == named["heldout_accuracy"] == 0.5 and named["heldout_balanced"]
    shuffled = torch.tensor([True] * 3 + [False] * 2 + [True] * 3).repeat(2)  # 5 right: half of the liked, all others
    found, better = measured(monkeypatch, best, (5, 5), done=2, liked=shuffled)
    assert better and best.step == 2 and found["choosing_accuracy"] == pytest.approx((3 / 6 + 2 / 2) / 2)
