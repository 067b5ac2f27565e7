"""Which pairs are shown: keyed, and of every caption before a second of any."""

import numpy as np

from dpo.pairing.look import Looked, Seen
from dpo.pairing.shown import spread

ONE = Seen(8, 8, "x", np.zeros((16, 16, 3), np.uint8))


def test_every_caption_comes_before_a_second_pair_of_one():
    pairs = [Looked(key, key, f"caption {key % 5}", ("a", "b"), ONE, ONE) for key in range(40)]
    order = spread(pairs)
    assert sorted(one.key for one in order) == list(range(40))
    assert all({one.caption for one in order[i : i + 5]} == {f"caption {c}" for c in range(5)} for i in range(0, 40, 5))
    assert spread(pairs[::-1]) == order != pairs
