"""Intervals."""

from __future__ import annotations

import math


def share_interval(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; successes may be fractional (ties count one half)."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959964
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
