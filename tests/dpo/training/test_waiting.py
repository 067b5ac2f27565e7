"""How long updates wait for their data."""

import pytest

from dpo.training import waiting
from dpo.training.waiting import LOOKED, Waiting


class Clock:
    def __init__(self):
        self.now = 0.0

    def monotonic(self):
        return self.now


def slow(clock, seconds):
    """Batches that each take so many seconds to come."""
    while True:
        clock.now += seconds
        yield None


@pytest.mark.parametrize("seconds, warns, said", [(0.2, True, 1), (0.05, True, 0), (0.2, False, 0)])
def test_the_share_is_that_of_an_update_and_a_long_wait_is_said_once(monkeypatch, caplog, seconds, warns, said):
    monkeypatch.setattr(waiting, "time", clock := Clock())
    batches = Waiting(slow(clock, seconds), warns)
    for _ in range(3 * LOOKED):
        next(batches), next(batches)
        assert batches.share(5.0) == pytest.approx(2 * seconds / 5.0)
    assert caplog.messages == []
    for _ in range(3 * LOOKED):
        next(batches)
        batches.share(1.0)
    assert caplog.text.count("waiting for data: raise --workers") == said


def test_the_first_update_in_which_workers_start_is_not_looked_at(monkeypatch, caplog):
    monkeypatch.setattr(waiting, "time", clock := Clock())
    batches = Waiting(slow(clock, 1000.0), warns=True)
    next(batches)
    assert batches.share(1000.0) == 1.0
    for _ in range(LOOKED):
        batches.share(1.0)
    assert caplog.messages == []
