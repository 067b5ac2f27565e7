"""Pairs and prompt lists: captions and seeds split once, labels as the scores say."""

import numpy as np

from dpo.data.writing import PICKAPIC
from dpo.tiny.judge import Reading
from dpo.tiny.making.pairs import FIRST_SEED, SHARES, TIE, judged, prompts_of, split_captions
from dpo.tiny.making.scenes import world


def test_captions_and_seeds_of_the_lists_never_meet():
    scene_world = world(24)
    lists = split_captions(scene_world)
    assert sum(len(set(captions)) for captions in lists.values()) == len(set().union(*lists.values())) == 24 * 8 * 4
    seeds = [set(prompts_of(scene_world, kind, 2000).seeds) for kind in SHARES]
    assert len(set().union(*seeds)) == sum(map(len, seeds))
    assert prompts_of(scene_world, "report", 8) == prompts_of(scene_world, "report", 8)
    assert list(FIRST_SEED) == list(SHARES)


class Sizes:
    """A judge that finds the sizes it is told, everything else alike."""

    def read(self, images):
        n = len(images)
        nothing = np.zeros((n, 1))
        return Reading(nothing, nothing, np.zeros(n), np.ones((n, 1)), images[:, 0, 0, 0] / 255, np.zeros((n, 2)))


def test_labels_follow_the_scores_and_near_scores_are_ties():
    n = 400
    small, large = np.full((n, 8, 8, 3), 115, np.uint8), np.full((n, 8, 8, 3), 230, np.uint8)
    rows, figures = judged("train", ["a frog"] * n, small, large, Sizes(), np.random.default_rng(0))
    assert rows.schema == PICKAPIC and figures["pairs"] == n and figures["ties"] == 0
    assert figures["labels_agree_with_score"] > 0.95  # the larger one is nearly one whole point better
    best = rows["best_image_uid"].to_pylist()
    second = [row == 1.0 for row in rows["label_1"].to_pylist()]
    assert [b == u for b, u in zip(best, rows["image_1_uid"].to_pylist())] == second
    _, figures = judged("train", ["a frog"] * n, small, small, Sizes(), np.random.default_rng(0))
    assert TIE > 0 and figures["ties"] == n
