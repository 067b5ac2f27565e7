"""A scorer of one's own for tests: in a moment without weights, and with numbers that tell what was scored together."""

from __future__ import annotations

import time

import numpy as np
import torch

PAUSE = 0.03  # seconds a batch, so that a kill can hit one


class Together:
    """The mean grey of an image and, as rounding does it in a large model, a little of those that it is scored with."""

    name, fingerprint = "together", "together 1"

    def score(self, *, images, captions):
        time.sleep(PAUSE)
        grey = [float(np.asarray(image.convert("L"), dtype=np.float64).mean()) for image in images]
        return torch.tensor(
            [one + len(text) + 1e-3 * sum(grey) for one, text in zip(grey, captions)], dtype=torch.float64
        )
