"""The embedded world's judges as scorers: the same numbers as the judges give."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.scorers.scorer import opened
from dpo.tiny.judge import load_judge, score

CPU = torch.device("cpu")


def test_they_are_the_judges():
    pictures = np.random.default_rng(0).integers(0, 256, (5, 64, 64, 3), dtype=np.uint8)
    images, captions = [Image.fromarray(picture) for picture in pictures], ["a red frog"] * 5
    fingerprints = set()
    for name in ("a", "b"):
        judge, scorer = load_judge(name), opened(f"tiny-{name}", device=CPU)
        assert scorer.score(images=images, captions=captions).numpy() == pytest.approx(score(judge.read(pictures)))
        fingerprints.add(scorer.fingerprint)
    faithful = opened("tiny-b-faithful", device=CPU)
    assert (
        faithful.score(images=images, captions=captions).tolist()
        == judge.faithful(judge.read(pictures), captions).tolist()
    )
    assert len(fingerprints | {faithful.fingerprint}) == 3


def test_images_of_another_size_are_one_line():
    with pytest.raises(UserError, match="tiny-b judges images of 64 x 64 pixels, not 512 x 512"):
        opened("tiny-b", device=CPU).score(images=[Image.new("RGB", (512, 512))], captions=["a red frog"])
