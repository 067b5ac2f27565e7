"""dpo.scorers.own: whatever holds numbers is taken, and what fails is one line that names the scorer."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.scorers.own import adopted, tried
from dpo.scorers.sets import OverPrompts, SetScorer

IMAGES = [Image.new("RGB", (8, 8), colour) for colour in ("black", "white")]


def made(score, **more):
    """A scorer of one's own whose `score` is this function."""
    return adopted(
        "mine:made", type("Mine", (), {"name": "mine", "fingerprint": "1", "score": staticmethod(score), **more})
    )


@pytest.mark.parametrize(
    "answer",
    [[1, 2.5], (1.0, 2.5), np.array([1, 2.5]), np.float32([1, 2.5]), torch.tensor([1, 2.5]).half().requires_grad_()],
)
def test_numbers_of_any_kind_are_taken(answer):
    scorer = made(lambda *, images, captions: answer)
    tried(scorer)
    assert scorer.score(images=IMAGES, captions=["a", "b"]).tolist() == [1.0, 2.5]
    assert not isinstance(scorer, SetScorer) and scorer.size is None and scorer.temperature is None


@pytest.mark.parametrize(
    ("score", "words"),
    [
        (lambda *, images, captions: 1 / 0, "its score fails .ZeroDivisionError: division by zero"),
        (lambda images, captions, /: [1, 2], "its score fails .TypeError"),
        (lambda *, images, captions: "ab", "its score gives 'ab', not numbers"),
        (lambda *, images, captions: None, "numbers of shape .* for 2 images: one number for each"),
        (lambda *, images, captions: [1], "shape .1,. for 2 images: one number for each image is needed"),
        (lambda *, images, captions: [[1, 2]], "shape .1, 2. for 2 images"),
    ],
)
def test_a_scorer_that_cannot_answer_is_one_line_before_anything_is_drawn(score, words):
    with pytest.raises(UserError, match=words) as refused:
        tried(made(score))
    assert "\n" not in str(refused.value) and ("mine" in str(refused.value))


def test_memory_and_the_scorers_own_user_errors_pass():
    for error in (MemoryError(), UserError("too dark")):

        def score(*, images, captions, error=error):
            raise error

        with pytest.raises(type(error)):
            made(score).score(images=IMAGES, captions=["a", "b"])


def test_one_of_a_set_may_answer_in_arrays_and_without_an_interval():
    def features(self, *, images):
        return [[float(image.getpixel((0, 0))[0]), 1.0] for image in images]

    scorer = made(lambda features, prompts: features.mean(), features=features)
    tried(scorer)
    assert isinstance(scorer, SetScorer) and not isinstance(scorer, OverPrompts)
    rows = scorer.features(images=IMAGES)
    assert rows.tolist() == [[0.0, 1.0], [255.0, 1.0]] and scorer.score(rows, np.array([0, 1])) == (64.25, None)
    with_interval = made(lambda features, prompts: (np.float32(2), [1, 3]), features=features)
    assert with_interval.score(rows, np.array([0, 1])) == (2.0, (1.0, 3.0))
    with pytest.raises(UserError, match="not one number for all images"):
        made(lambda features, prompts: [1, 2, 3], features=features).score(rows, np.array([0, 1]))
    with pytest.raises(UserError, match="a row of numbers for each image is needed"):
        tried(made(lambda features, prompts: 1.0, features=lambda self, *, images: [1.0]))


def test_a_scorer_of_ones_own_size_is_tried_with_that():
    seen = []
    scorer = made(lambda *, images, captions: [seen.append(image.size) or 1 for image in images], size=(12, 20))
    tried(scorer)
    assert seen == [(12, 20), (12, 20)]
