"""Confidence intervals of counted shares."""

from __future__ import annotations

import math

Z95 = 1.959964  # standard deviations of a normal distribution on either side that hold 95 %


def share_interval(successes: float, count: float, z: float = Z95) -> tuple[float, float]:
    """Wilson's interval of a share, 95 % unless `z` says otherwise (E. B. Wilson, 1927).

    Both may be fractional: a tie counts one half, and pairs of one prompt fewer than they are. With a count of 0 the interval is 0 to 1.
    """
    if count == 0:
        return 0.0, 1.0
    share = successes / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, centre - half), min(1.0, centre + half)
