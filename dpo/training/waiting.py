"""How long the updates wait for their micro-batches."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator

from dpo.data.batch import PairBatch
from dpo.pages.figures import LONG_WAIT

LOOKED = 50  # updates, after which a long wait is said; the first one, in which the workers start, counts nowhere

log = logging.getLogger("dpo")


class Waiting:
    """The micro-batches, and the seconds that asking for them took. With `warns` a long wait is said once in the log."""

    def __init__(self, batches: Iterator[PairBatch], warns: bool = False) -> None:
        self._batches, self._warns = batches, warns
        self._waited = 0.0  # seconds, in this update
        self._total = [0.0, 0.0]  # seconds waited and in all, since the last look
        self._updates = -1

    def __iter__(self) -> Iterator[PairBatch]:
        return self

    def __next__(self) -> PairBatch:
        began = time.monotonic()
        try:
            return next(self._batches)
        finally:
            self._waited += time.monotonic() - began

    def share(self, seconds: float) -> float:
        """Ends an update of so many seconds: the share of them that was spent waiting."""
        waited, self._waited = self._waited, 0.0
        self._updates += 1
        if self._updates and self._warns:
            self._total = [self._total[0] + waited, self._total[1] + seconds]
            if self._updates % LOOKED == 0:
                self._look()
        return waited / seconds

    def _look(self) -> None:
        (waited, seconds), self._total = self._total, [0.0, 0.0]
        if waited > LONG_WAIT * seconds:
            self._warns = False
            log.warning(
                "%.0f %% of the last %d updates was spent waiting for data: raise --workers, or encode the pairs once with "
                "python -m dpo.prepare",
                100 * waited / seconds, LOOKED,
            )  # fmt: skip
