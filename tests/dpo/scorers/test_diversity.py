"""Distances against a loop over pairs; the set scorers' interface."""

from itertools import combinations

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.spatial.distance import cosine

from dpo.common.errors import UserError
from dpo.scorers.clip import clip_l14
from dpo.scorers.diversity import Diversity, distances, opened
from dpo.scorers.sets import OverPrompts, SetScorer
from tests.help.towers import save_tiny_clip

PROMPTS = np.array([4, 2, 4, 9, 2, 4, 7])


def test_the_distance_of_a_prompt_is_the_mean_over_its_pairs():
    features = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)) * 30
    kept, found = distances(features, PROMPTS)
    expected = {
        prompt: np.mean(
            [cosine(features[i], features[j]) for i, j in combinations(np.flatnonzero(prompt == PROMPTS), 2)]
        )
        for prompt in (2, 4)
    }
    assert dict(zip(kept, found)) == pytest.approx(expected, abs=1e-6)


def test_like_images_have_no_distance_and_opposite_ones_two():
    features = torch.tensor([[1.0, 2.0], [2.0, 4.0], [1.0, 0.0], [-3.0, 0.0]])
    assert distances(features, np.array([0, 0, 1, 1]))[1] == pytest.approx([0.0, 2.0], abs=1e-12)


def test_a_set_scorer_averages_over_prompts_with_an_interval():
    scorer: SetScorer = Diversity(embed=lambda images: torch.stack([torch.tensor(i) for i in images]), fingerprint="x")
    assert isinstance(scorer, SetScorer) and isinstance(scorer, OverPrompts)
    rng = np.random.default_rng(0)
    prompts = np.repeat(np.arange(30), 3)
    features = scorer.features(images=list(rng.normal(size=(90, 8))))
    assert features.dtype == torch.float32
    value, (low, high) = scorer.score(features, prompts)
    assert value == pytest.approx(distances(features, prompts)[1].mean()) and low < value < high
    assert (value, (low, high)) == scorer.score(features, prompts)
    assert scorer.score(features[:6], prompts[:6])[1] is None


def test_single_images_have_no_diversity():
    scorer = Diversity(embed=lambda images: torch.eye(4), fingerprint="x")
    with pytest.raises(
        UserError, match="^diversity compares the images of a prompt: draw two seeds or more of each \\(--seeds 2\\)$"
    ):
        scorer.score(torch.eye(4), np.arange(4))


def test_it_is_the_cosine_of_clips_image_tower(tmp_path):
    save_tiny_clip(tmp_path)
    found = opened(place=str(tmp_path), device="cpu", dtype=torch.float32, cache_dir=None)
    scorer = clip_l14(place=str(tmp_path), device="cpu", dtype=torch.float32, cache_dir=None)
    noise = np.random.default_rng(0).integers(0, 256, (4, 40, 40, 3), dtype=np.uint8)
    images = [Image.fromarray(one) for one in noise]
    features = found.features(images=images)
    assert torch.equal(features, scorer.towers.images(images)) and features.shape == (4, 16)
    value, interval = found.score(features, np.zeros(4, int))
    assert interval is None and value == pytest.approx(
        np.mean([cosine(a, b) for a, b in combinations(features.double(), 2)]), abs=1e-6
    )
    assert found.name == "diversity" and found.fingerprint != scorer.fingerprint
