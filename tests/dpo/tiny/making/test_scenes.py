"""Scenes: deterministic, captioned as they are drawn, with combinations kept from base training."""

import numpy as np
import pytest

from dpo.tiny.making import sprites
from dpo.tiny.making.scenes import Renderer, caption, prefer, world
from dpo.tiny.world import COLOURS, PLAIN, named


@pytest.fixture(scope="module")
def small():
    scene_world = world(4)
    return scene_world, Renderer(sprites.stand_ins(list(scene_world.objects)))


def test_the_same_seed_draws_the_same_pictures(small):
    scene_world, render = small
    one = scene_world.sample(np.random.default_rng(5), 16)
    two = scene_world.sample(np.random.default_rng(5), 16)
    assert scene_world.captions(one) == scene_world.captions(two)
    images = render(one)
    assert images.shape == (16, 64, 64, 3) and images.dtype == np.uint8
    assert np.array_equal(images, Renderer(render.sprites)(two))
    assert not np.array_equal(images, render(scene_world.sample(np.random.default_rng(6), 16)))


def test_held_out_combinations_are_never_sampled_for_base_training():
    scene_world = world(24)
    assert scene_world.held_out.mean() == pytest.approx(0.15, abs=0.005)
    assert scene_world.held_out.sum(1).min() >= 1
    scenes = scene_world.sample(np.random.default_rng(0), 2000)
    assert not scene_world.held_out[scenes.object, scenes.colour].any()
    kept = scene_world.sample(np.random.default_rng(0), 200, combinations="held_out")
    assert scene_world.held_out[kept.object, kept.colour].all()


def test_captions_name_object_and_colour():
    scene_world = world(40)
    scenes = scene_world.sample(np.random.default_rng(1), 500, combinations="all")
    captions = scene_world.captions(scenes)
    assert [named(text, scene_world.objects) for text in captions] == list(scenes.object)
    assert [named(text, COLOURS) for text in captions] == list(scenes.colour)
    assert caption("owl", "orange") == "an owl on an orange background"
    assert caption("unicorn", "red") == "a unicorn on a red background"
    assert named("a spaceship on a red background", scene_world.objects) == -1


def flatness(images_NHWC: np.ndarray, ring: int = 3, tolerance: float = 12.0) -> np.ndarray:
    """[N] share of the border ring within `tolerance` (mean over channels) of its median colour: near 1 on a plain
    backdrop.
    """
    inside = np.zeros(images_NHWC.shape[1:3], bool)
    inside[ring:-ring, ring:-ring] = True
    border = images_NHWC[:, ~inside].astype(np.float32)  # [N, P, 3]
    return (np.abs(border - np.median(border, axis=1, keepdims=True)).mean(-1) < tolerance).mean(-1)


def test_plain_backdrops_are_flat_and_others_are_not(small):
    scene_world, render = small
    scenes = scene_world.sample(np.random.default_rng(2), 300)
    flat = flatness(render(scenes))
    assert flat[scenes.backdrop == PLAIN].min() > 0.98  # a large object may touch the ring
    assert (flat[scenes.backdrop != PLAIN] < 0.98).mean() > 0.97  # a pattern may hide behind it


def test_a_noisy_rater():
    n = 4000
    better, worse = np.full(n, 2.0), np.full(n, 1.5)
    assert prefer(np.random.default_rng(0), better, worse).mean() == pytest.approx(1 / (1 + np.exp(-2.0)), abs=0.02)
