"""Checks: an image that anybody sees is broken, and one image twice."""

import numpy as np

from dpo.common.pictures import pixel_hash
from dpo.voting.checks import FOLDER, LEAST, MOST, Pair, item, made
from dpo.voting.shown import load
from dpo.voting.study import BROKEN
from tests.help.votes import make_folder


def pairs(tmp_path, count):
    sides = [
        make_folder(tmp_path / name, count, colour) for name, colour in (("a", (200, 30, 30)), ("b", (30, 200, 30)))
    ]
    found = [Pair(f"p{n}", "", (0, 1), (sides[0] / f"{n}.png", sides[1] / f"{n}.png"), 0) for n in range(count)]
    return found, {path: pixel_hash(load(path)) for pair in found for path in pair.paths}


def test_broken_and_same_images_of_keyed_pairs(tmp_path):
    found, hashes = pairs(tmp_path, 30)
    items = list(made(tmp_path, b"key", 0, found, hashes, 4))
    broken, same = items[:4], items[4:]
    assert [one.kind for one in items] == ["broken"] * 4 + ["same"] * 4 and len({one.id for one in items}) == 8
    assert {one.sides for one in same} == {(0, 0), (1, 1)} and {one.sides for one in broken} == {
        (BROKEN, 0),
        (BROKEN, 1),
    }
    for one in same:
        assert one.images[0] == one.images[1] and one.hashes[0] == one.hashes[1]
    for one in broken:
        spoilt, sound = (load(tmp_path / image) for image in one.images)
        assert (pixel_hash(spoilt), pixel_hash(sound)) == one.hashes and one.images[0].startswith(f"{FOLDER}/")
        near = np.abs(np.diff(np.asarray(spoilt, dtype=float), axis=1)).mean()
        assert near > 30 > np.abs(np.diff(np.asarray(sound, dtype=float), axis=1)).mean()  # noise from pixel to pixel
    again = list(made(tmp_path, b"key", 0, found, hashes, 4))
    assert again == items and list(made(tmp_path, b"key", 1, found, hashes, 4)) != items
    other = list(made(tmp_path, b"other", 0, found, hashes, 4))
    assert not {one.id for one in other} & {one.id for one in items}
    assert {one.prompt for one in broken} != {one.prompt for one in same}


def test_their_number_is_bounded(tmp_path):
    found, hashes = pairs(tmp_path, 30)
    for count, each in ((0, LEAST), (7, 7), (999, MOST)):
        assert len(list(made(tmp_path, b"key", 0, found, hashes, count))) == 2 * each
    few = list(made(tmp_path, b"key", 0, found[:1], hashes, 5))
    assert [one.kind for one in few] == ["broken", "same"]


def test_one_prompt_of_several_pairs_gives_checks_of_several_names(tmp_path):
    found, hashes = pairs(tmp_path, 1)
    three = [found[0], found[0]._replace(sides=(0, 2)), found[0]._replace(sides=(1, 2))]
    items = list(made(tmp_path, b"key", 0, three, hashes, 3))
    assert len({one.id for one in items}) == len(items) == 6


def test_an_id_tells_nothing_and_is_the_same_for_the_same_name(tmp_path):
    found, hashes = pairs(tmp_path, 1)
    ids = {item(key, "vote", name, found[0], hashes).id for key in (b"1", b"2") for name in (["p"], ["p", 0])}
    assert len(ids) == 4 and all(len(id) == 16 and int(id, 16) >= 0 for id in ids)
    assert item(b"1", "vote", ["p"], found[0], hashes).id in ids
