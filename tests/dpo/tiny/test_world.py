"""What a caption names, and what the hidden taste prefers."""

import pytest

from dpo.tiny.world import COLOURS, SIZES, named, taste


def test_taste_likes_3d_plain_and_large():
    assert taste(1.0, 1.0, SIZES[1]) == pytest.approx(3.0)
    assert taste(0.0, 0.0, SIZES[0]) == pytest.approx(0.0)


def test_a_caption_names_whole_words():
    assert named("a picture of a car, pink background", ("carrot", "car")) == 1
    assert named("a picture of a car, pink background", COLOURS) == list(COLOURS).index("pink")
    assert named("A FROG on a plinth", ("owl", "frog")) == 1
    assert named("a spaceship on a red background", ("owl", "frog")) == -1
