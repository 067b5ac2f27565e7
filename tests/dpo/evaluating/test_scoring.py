"""Scores of a side's images: one for each, through the cache, flat memory, and what cannot be read is named."""

import random
import threading
import time
import weakref
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.evaluating.scoring import BATCH, Look, features, read_image, scores, table_scores
from dpo.evaluating.sides import Shown, Side
from dpo.scorers.cache import ScoreCache
from tests.help.children import kill_until_done


@dataclass
class Red:
    """The red of the first pixel, plus the length of the caption."""

    name: str = "red"
    fingerprint: str = "red 1"
    seen: list[int] = field(default_factory=list)

    def score(self, *, images, captions):
        self.seen.append(len(images))
        return torch.tensor(
            [image.getpixel((0, 0))[0] + len(text) for image, text in zip(images, captions, strict=True)]
        ).float()


@dataclass
class Colours(Red):
    """A scorer of a set, whose features are the first pixel, and how many images it has seen by then."""

    fingerprint: str = "colours 1"

    def features(self, *, images):
        self.seen.append(len(images))
        return torch.tensor([[*image.getpixel((0, 0)), sum(self.seen)] for image in images]).float()


@pytest.fixture
def side(tmp_path):
    rng = np.random.default_rng(0)
    shown = []
    for i in range(37):
        path = tmp_path / "images" / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        shown.append(Shown(path, "x" * (i % 3)))
    return Side("b", tmp_path / "images", tuple(shown))


def expected(side):
    return [Image.open(image.path).getpixel((0, 0))[0] + len(image.prompt) for image in side.images]


def test_every_image_once_and_then_from_the_cache(side, tmp_path):
    scorer, said = Red(), []
    with ScoreCache(tmp_path / "c") as cache:
        found = scores(side, scorer, cache, Look(), read_image, lambda done, total: said.append((done, total)))
        assert found.tolist() == expected(side) and sum(scorer.seen) == 37 and said[-1] == (37, 37)
        again = Red()
        assert scores(side, again, cache, Look(), read_image).tolist() == expected(side) and again.seen == []
        renamed = Red(fingerprint="red 2")
        look = Look()
        scores(side, again, cache, look, read_image)
        calls = []
        scores(side, renamed, cache, look, lambda path: calls.append(path) or read_image(path))
        assert len(calls) == 37, "another fingerprint is another scorer"
        calls.clear()
        scores(side, renamed, cache, look, lambda path: calls.append(path) or read_image(path))
        assert calls == [], "known images are not even read"


def test_what_cannot_be_read_is_named_and_left_out(side, tmp_path, caplog):
    side.images[3].path.write_bytes(b"not an image")
    side.images[5].path.unlink()
    side.images[7].path.write_bytes(side.images[7].path.read_bytes()[:60])
    Image.new("RGB", (16, 16), "white").save(side.images[9].path)
    look = Look()
    with ScoreCache(tmp_path / "c") as cache:
        found = scores(side, Red(), cache, look, read_image)
    assert np.flatnonzero(np.isnan(found)).tolist() == [3, 5, 7]
    assert {path.name for path in look.unusable} == {"003.png", "005.png", "007.png"}
    assert [path.name for path in look.flat] == ["009.png"] and found[9] == 255


@pytest.mark.long
def test_a_bomb_is_left_out_and_not_decoded(side, tmp_path):
    Image.new("L", (20000, 20000)).save(side.images[0].path)
    look = Look()
    with ScoreCache(tmp_path / "c") as cache:
        assert np.isnan(scores(side, Red(), cache, look, read_image)[0])
    assert "pixels" in next(iter(look.unusable.values()))


def test_a_scorer_that_gives_too_few_or_no_numbers(side, tmp_path, caplog):
    few, none = Red(), Red(fingerprint="none")
    few.score = lambda *, images, captions: torch.zeros(1)
    none.score = lambda *, images, captions: torch.full((len(images),), torch.nan)
    with ScoreCache(tmp_path / "c") as cache:
        with pytest.raises(UserError, match=r"red gave \(1,\) scores for 16 images"):
            scores(side, few, cache, Look(), read_image)
        assert np.isnan(scores(side, none, cache, Look(), read_image)).all()
    assert "no finite score to 37 images" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("compute", [scores, features])
def test_memory_is_flat(tmp_path, compute):
    """However many images a side has, few of them are in memory at once."""
    Image.new("RGB", (64, 64), "red").save(path := tmp_path / "x.png")
    many = Side("b", tmp_path, tuple(Shown(path, str(i)) for i in range(1500)))
    alive, most, lock = 0, 0, threading.Lock()

    def gone():
        nonlocal alive
        with lock:
            alive -= 1

    def read(place):
        nonlocal alive, most
        image = read_image(place)
        weakref.finalize(image, gone)
        with lock:
            alive += 1
            most = max(most, alive)
        return image

    with ScoreCache(tmp_path / "c") as cache:
        compute(many, Colours(), cache, Look(), read)
    assert BATCH <= most <= 6 * BATCH, "a stretch that is read ahead, and a batch that waits"


def test_features_are_computed_once_an_image(side, tmp_path):
    scorer, said = Colours(), []
    pixels = [list(Image.open(image.path).getpixel((0, 0))) for image in side.images]
    with ScoreCache(tmp_path / "c") as cache:
        found = features(side, scorer, cache, Look(), read_image, lambda done, total: said.append((done, total)))
        assert found.dtype == np.float32 and found[:, :3].tolist() == pixels
        assert scorer.seen == [16, 16, 5] and said[-1] == (37, 37)
        renamed = Side("c", side.place, tuple(image._replace(prompt="another") for image in side.images))
        again = Colours()
        assert np.array_equal(features(renamed, again, cache, Look(), read_image), found) and again.seen == []
        assert features(side, Colours(fingerprint="colours 2"), cache, Look(), read_image, batch=5)[0, 3] == 5


def test_equal_images_have_equal_features(side, tmp_path):
    """Also where they are computed in other batches, in which the numbers round otherwise."""
    image = side.images[0].path.read_bytes()
    for place in (1, 20, 36):
        side.images[place].path.write_bytes(image)
    scorer = Colours()
    with ScoreCache(tmp_path / "c") as cache:
        found = features(side, scorer, cache, Look(), read_image)
        assert (found[[1, 20, 36]] == found[0]).all() and sum(scorer.seen) == 34
        assert np.array_equal(features(side, scorer, cache, Look(), read_image), found)


def test_features_of_what_cannot_be_read_are_nan(side, tmp_path, caplog):
    side.images[3].path.unlink()
    look, scorer = Look(), Colours()
    with ScoreCache(tmp_path / "c") as cache:
        assert np.flatnonzero(np.isnan(features(side, scorer, cache, look, read_image)).all(1)).tolist() == [3]
        assert {path.name for path in look.unusable} == {"003.png"} and caplog.text == ""
        scorer.features = lambda *, images: torch.full((len(images), 4), torch.nan)
        scorer.fingerprint = "none"
        assert np.isnan(features(side, scorer, cache, look, read_image)).all()
        assert "red gave no finite features to 36 images of b: they are left out" in caplog.text
        for wrong in (torch.zeros(16), torch.zeros(1, 4)):
            scorer.features = lambda *, images, wrong=wrong: wrong
            with pytest.raises(UserError, match=r"red gave \(\d+(,|, 4)\) features for 16 images: a row each"):
                features(side, scorer, cache, look, read_image)
        widths = iter((4, 5, 6))
        scorer.features = lambda *, images: torch.zeros(len(images), next(widths))
        with pytest.raises(UserError, match="features of 4 and of 5 numbers"):
            features(side, scorer, cache, look, read_image)


def test_an_interrupted_run_goes_on_with_the_features_that_it_has(tmp_path):
    """Killed at any moment: each process computes what the ones before had not kept, and the result is the same."""
    shown = []
    for i in range(96):
        Image.fromarray(np.full((8, 8, 3), i, np.uint8)).save(path := tmp_path / f"{i:03d}.png")
        shown.append(Shown(path, "x"))
    many, calls = Side("b", tmp_path, tuple(shown)), tmp_path / "calls"

    @dataclass
    class Slow(Colours):
        def features(self, *, images):
            time.sleep(0.02)
            with calls.open("a") as file:
                file.write("x" * len(images))
            return torch.tensor([image.getpixel((0, 0)) for image in images]).float()

    def work():
        with ScoreCache(tmp_path / "c") as cache:
            assert features(many, Slow(), cache, Look(), read_image)[:, 0].tolist() == list(range(96))

    kill_until_done(work, random.Random(0), 4, 0.15)
    seen = len(calls.read_text())
    assert 96 <= seen <= 96 + 4 * BATCH, "at most the batch that was being computed is lost by a kill"
    work()
    assert len(calls.read_text()) == seen


def test_scores_of_another_program(side, tmp_path):
    table = tmp_path / "geneval.jsonl"
    lines = [
        f'{{"filename": "{image.path}", "correct": {"true" if i % 2 else "false"}}}'
        for i, image in enumerate(side.images[:30])
    ]
    table.write_text("\n".join(lines))
    found = table_scores([side], table, Look())["b"]
    assert found[:30].tolist() == [i % 2 for i in range(30)] and np.isnan(found[30:]).all()
    for text, words in (
        ("file,score\nother.png,1\n", "has no score for any image of b"),
        ("file,score\n000.png,much\n", "row 1: 'much' is not a number"),
        ("file,points\n000.png,1\n", r"row 1: needs a file"),
    ):
        (tmp_path / "x.csv").write_text(text)
        with pytest.raises(UserError, match=words):
            table_scores([side], tmp_path / "x.csv", Look())
    assert Path(table).exists()


def test_a_row_that_names_images_of_two_sides_is_refused(tmp_path):
    """The numbers of one model would be those of the other, and every comparison a tie."""
    for folder, shades in (("a", (10, 20)), ("b", (10, 30))):
        (tmp_path / folder).mkdir()
        for i, shade in enumerate(shades):
            Image.new("RGB", (4, 4), (shade,) * 3).save(tmp_path / folder / f"{i:03d}.png")
    a, b = (
        Side(folder, tmp_path / folder, tuple(Shown(tmp_path / folder / f"{i:03d}.png", "x") for i in range(2)))
        for folder in "ab"
    )
    table = tmp_path / "scores.csv"
    table.write_text("file,score\n000.png,1\n001.png,2\n")
    said = r"row 2 of .*scores.csv names 001.png, which is an image of a \(.*\) and of b \(.*\): give more of its path, or its hash"
    with pytest.raises(UserError, match=said):
        table_scores([a, b], table, Look())
    assert table_scores([a], table, Look())["a"].tolist() == [1, 2]
    table.write_text("file,score\n000.png,1\na/001.png,2\nb/001.png,3\n")
    found = table_scores([a, b], table, Look())
    assert found["a"].tolist() == [1, 2] and found["b"].tolist() == [1, 3], "000.png is one picture of both"


def test_pictures_of_another_size_are_left_out_where_a_scorer_knows_one_alone(side, tmp_path, caplog):
    Image.new("RGB", (16, 12)).save(side.images[4].path)
    sized = Red()
    sized.size = (16, 16)
    with ScoreCache(tmp_path / "c") as cache:
        found = scores(side, sized, cache, Look(), read_image)
        assert np.flatnonzero(np.isnan(found)).tolist() == [4] and sum(sized.seen) == 36
        assert "red judges images of 16 x 16 pixels, not 16 x 12: 1 of 37 images of b is left out" in caplog.text
        sized.size, sized.fingerprint = (64, 64), "red 64"
        with pytest.raises(UserError, match="judges images of 64 x 64 pixels, not 16 x 16 as those of b are"):
            scores(side, sized, cache, Look(), read_image)
