"""The embedded world's judges as scorers: the same numbers as the judges give."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.scorers.scorer import opened
from dpo.tiny.judge import load_judge, score
from dpo.tiny.paths import validation_pairs_path

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


def test_diversity_sees_what_no_caption_names():
    """The same pictures again have none, other pictures of the same caption some, other captions more."""
    pairs = pq.read_table(validation_pairs_path()).to_pylist()[:40]
    first, second = (
        [Image.open(io.BytesIO(pair[name])).convert("RGB") for pair in pairs] for name in ("jpg_0", "jpg_1")
    )
    scorer = opened("tiny-diversity", device=CPU)
    prompts = np.arange(len(pairs))

    def value(*sets):
        features = torch.cat([scorer.features(images=images) for images in sets])
        return scorer.score(features, np.tile(prompts, len(sets)))

    same, other, apart = value(first, first), value(first, second), value(first, first[1:] + first[:1])
    assert same[0] == pytest.approx(0, abs=1e-6)
    assert other[1][0] > 0.05 and apart[1][0] > other[1][1]
    assert torch.equal(scorer.features(images=first), scorer.features(images=first))
    with pytest.raises(UserError, match="tiny-diversity judges images of 64 x 64 pixels, not 512 x 512"):
        scorer.features(images=[Image.new("RGB", (512, 512))])
    assert len({opened(name, device=CPU).fingerprint for name in ("tiny-b", "tiny-b-faithful", "tiny-diversity")}) == 3
