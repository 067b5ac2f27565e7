"""Distances against a loop over pairs; the set scorers' interface."""

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine

from dpo.common.errors import UserError
from dpo.scorers.diversity import Diversity, distances
from dpo.scorers.sets import SetScorer

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
    assert {name for name in vars(SetScorer) if not name.startswith("_")} <= set(dir(scorer))
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
    with pytest.raises(UserError, match="^diversity compares the images of a prompt: draw two seeds or more of each$"):
        scorer.score(torch.eye(4), np.arange(4))
