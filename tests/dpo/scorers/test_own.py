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


@pytest.mark.parametrize("size", [[64, 48], np.array([64, 48]), (np.int64(64), 48), torch.tensor([64, 48])])
def test_a_size_is_a_pair_whatever_holds_it(size):
    """Else images of just that size are refused once they are drawn."""
    assert made(lambda *, images, captions: [1, 2], size=size).size == (64, 48) == Image.new("RGB", (64, 48)).size


@pytest.mark.parametrize("size", [64, (64,), (64, 64, 3), (64, 0), (64.0, 64.0), "64", (), [None, 1]])
def test_a_size_that_is_none_is_one_line(size):
    with pytest.raises(
        UserError, match="^--scorers mine:made: its size is .*; two whole numbers above 0 are needed, width"
    ):
        made(lambda *, images, captions: [1, 2], size=size)


def of_prompts(answer, score=lambda features, prompts: 1.0):
    return made(score, features=lambda self, *, images: [[1.0]] * len(images), by_prompt=lambda self, f, p: answer)


@pytest.mark.parametrize(
    "answer",
    [([0, 2], [1.0, 2.5]), (torch.tensor([0, 2]), torch.tensor([1, 2.5])), [np.array([0, 2]), (1, 2.5)]],
)
def test_numbers_by_prompt_may_be_anything_that_holds_numbers(answer):
    found = of_prompts(answer).by_prompt(torch.ones(3, 1), np.array([0, 1, 2]))
    assert all(isinstance(one, np.ndarray) for one in found) and found[0].dtype == np.int64
    assert [one.tolist() for one in found] == [[0, 2], [1.0, 2.5]]


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ([1.0], "its by_prompt gives a list of 1, not the prompts and the number of each"),
        (None, "its by_prompt gives None, not the prompts"),
        ((["a"], [1.0]), "its by_prompt gives .*a.*, not numbers"),
        (([0, 1], [1.0]), r"prompts of shape \(2,\) and numbers of shape \(1,\); a number for each"),
        (([3], [1.0]), "a number for each of some of the prompts is needed"),
    ],
)
def test_numbers_by_prompt_that_are_none_are_one_line(answer, words):
    with pytest.raises(UserError, match=f"^--scorers mine:made: .*{words}"):
        of_prompts(answer).by_prompt(torch.ones(3, 1), np.array([0, 1, 2]))


def test_an_interval_has_two_ends():
    with pytest.raises(UserError, match="its score gives the interval a list of 3, not its two ends"):
        of_prompts(None, lambda features, prompts: (1.0, [1, 2, 3])).score(torch.ones(2, 1), np.array([0, 1]))
