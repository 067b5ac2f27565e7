"""The arithmetic of a comparison."""

import numpy as np
import pytest

from dpo.tiny.evaluate import tally, wilson


def test_wins_losses_and_ties():
    base = np.array([1.0, 1.0, 1.0, 1.0])
    policy = np.array([2.0, 1.5, 0.5, 1.0])
    found = tally(base, policy, np.array([True, True, True, False]), np.array([True, False, True, False]))
    assert found.win_rate == pytest.approx(2.5 / 4)
    assert (found.faithful_base, found.faithful_policy) == (0.75, 0.5)
    assert (found.score_base, found.score_policy) == (1.0, 1.25)
    assert found.low < found.win_rate < found.high and found.pairs == 4


def test_an_unchanged_model_reads_one_half():
    scores = np.linspace(0, 3, 50)
    faithful = np.ones(50, bool)
    found = tally(scores, scores, faithful, faithful)
    assert found.win_rate == 0.5
    assert found.low == pytest.approx(1 - found.high)


def test_wilson_interval():
    low, high = wilson(50, 100)  # textbook value: 0.404 to 0.596
    assert (low, high) == (pytest.approx(0.4038, abs=1e-3), pytest.approx(0.5962, abs=1e-3))
    assert wilson(0, 20)[0] == 0.0 and wilson(20, 20)[1] == pytest.approx(1.0)
    assert wilson(0, 20)[1] == pytest.approx(0.161, abs=1e-3)
