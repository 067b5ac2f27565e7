"""The arithmetic of a comparison, and what a picture depends on."""

import numpy as np
import pytest
import torch

from dpo.common.stats import share_interval
from dpo.tiny.evaluate import draw, tally
from dpo.tiny.making import pipeline, text, vae


def test_wins_losses_and_ties():
    base = np.array([1.0, 1.0, 1.0, 1.0])
    policy = np.array([2.0, 1.5, 0.5, 1.0])
    found = tally(base, policy, np.array([True, True, True, False]), np.array([True, False, True, False]))
    assert found.win_rate == pytest.approx(2.5 / 4)
    assert (found.faithful_base, found.faithful_policy) == (0.75, 0.5)
    assert (found.score_base, found.score_policy) == (1.0, 1.25)
    assert (found.low, found.high) == share_interval(2.5, 4) and found.pairs == 4
    assert found.low < found.win_rate < found.high


def test_an_unchanged_model_reads_one_half():
    scores = np.linspace(0, 3, 50)
    faithful = np.ones(50, bool)
    found = tally(scores, scores, faithful, faithful)
    assert found.win_rate == 0.5
    assert found.low == pytest.approx(1 - found.high)


def test_the_interval_of_a_policy_that_never_wins():
    found = tally(np.ones(20), np.zeros(20), np.ones(20, bool), np.ones(20, bool))
    assert (found.win_rate, found.low) == (0.0, 0.0) and found.high == pytest.approx(0.161, abs=1e-3)  # Wilson's


def test_a_picture_depends_on_its_prompt_and_seed_alone(tmp_path):
    torch.manual_seed(0)
    tokenizer = text.tokenizer(tmp_path)
    pipe = pipeline.pipeline(pipeline.unet(), text.text_encoder(tokenizer), tokenizer, vae.build())
    prompts, seeds = ["a frog on a red background", "an owl on a blue background", ""], [1, 2, 1]
    together = draw(pipe, prompts, seeds, steps=2)
    alone = draw(pipe, prompts[1:2], seeds[1:2], steps=2)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(together[0], together[2])
