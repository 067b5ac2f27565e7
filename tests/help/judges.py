"""A scorer of one's own for tests: in a moment without weights, and with numbers that tell what was scored together."""

from __future__ import annotations

import time

import numpy as np
import torch

TRIED = 2  # images that a scorer of one's own is asked for before anything else
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


class Grey:
    """The mean grey of an image, 0 to 1; `seen` counts the images of the scorings of this process."""

    name, fingerprint = "grey", "grey 1"
    seen = 0

    def score(self, *, images, captions):
        Grey.seen += len({image.tobytes() for image in images})
        return torch.tensor([float(np.asarray(image.convert("L"), dtype=np.float64).mean()) / 255 for image in images])


class Dark(Grey):
    """The same the other way round, with a temperature of its own."""

    name, fingerprint, temperature = "dark", "dark 1", 6.0

    def score(self, *, images, captions):
        return 1 - super().score(images=images, captions=captions)


class Constant:
    """One score for everything."""

    name, fingerprint = "constant", "constant 1"

    def score(self, *, images, captions):
        return torch.ones(len(images))


class Impostor(Grey):
    """One that has the name of a listed scorer."""

    name = "tiny-b"


class OfSet:
    """A scorer of a whole set."""

    name, fingerprint = "of-set", "of-set 1"

    def features(self, *, images):
        return torch.zeros(len(images), 1)

    def score(self, features, prompts):
        return 0.0, None


class Some(Grey):
    """The mean grey, and no number for dark images."""

    name, fingerprint = "some", "some 1"

    def score(self, *, images, captions):
        grey = super().score(images=images, captions=captions)
        return torch.where(grey < 0.2, torch.nan, grey)
