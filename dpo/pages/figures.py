"""The figures of a run."""

from __future__ import annotations

DECILES = 10
