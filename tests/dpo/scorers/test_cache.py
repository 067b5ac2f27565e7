"""Scores kept in a file: found again, kept apart, whole after a kill and with two processes."""

import random
import sqlite3
from contextlib import closing

import numpy as np
import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.common.pictures import pixel_hash
from dpo.scorers.cache import ScoreCache
from tests.help.children import kill_until_done


def test_what_was_put_is_found_and_nothing_else(tmp_path):
    with ScoreCache(tmp_path / "deep" / "scores.sqlite") as cache:
        cache.put("clip", [("image", "a fox", 0.1), ("image", "a cat", -2.5)])
        assert (cache.get("image", "clip", "a fox"), cache.get("image", "clip", "a cat")) == (0.1, -2.5)
        assert cache.get("image", "other", "a fox") is cache.get("else", "clip", "a fox") is None
        cache.put("clip", [("image", "a fox", 0.2), ("image", "\ud800\0", 7.0)])
    with ScoreCache(tmp_path / "deep" / "scores.sqlite") as cache:
        assert (cache.get("image", "clip", "a fox"), cache.get("image", "clip", "\ud800\0")) == (0.2, 7.0)


def test_features_are_found_to_the_last_bit_also_in_a_file_of_an_earlier_version(tmp_path):
    path = tmp_path / "scores.sqlite"
    with sqlite3.connect(path) as old:
        old.execute("CREATE TABLE scores (key BLOB PRIMARY KEY, value REAL NOT NULL) WITHOUT ROWID")
    old.close()
    row = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    with ScoreCache(path) as cache:
        cache.put_features("clip", [("image", row), ("other", -row)])
    with ScoreCache(path) as cache:
        found = cache.get_features("image", "clip")
        assert found.dtype == np.float32 and found.tobytes() == row.tobytes()
        assert cache.get_features("other", "clip").tobytes() == (-row).tobytes()
        assert cache.get_features("image", "else") is cache.get_features("none", "clip") is None
        assert cache.get("image", "clip", "") is None, "scores are apart"


def test_equal_pictures_have_equal_hashes(tmp_path):
    image = Image.linear_gradient("L").convert("RGB")
    image.save(tmp_path / "a.png", compress_level=1)
    image.save(tmp_path / "b.webp", lossless=True)
    hashes = {pixel_hash(Image.open(tmp_path / name)) for name in ("a.png", "b.webp")} | {pixel_hash(image)}
    assert len(hashes) == 1
    wide, tall = Image.new("RGB", (2, 8)), Image.new("RGB", (8, 2))
    assert pixel_hash(wide) != pixel_hash(tall)
    image.putpixel((0, 0), (1, 0, 0))
    assert pixel_hash(image) not in hashes


@pytest.mark.long
def test_kills_leave_whole_batches(tmp_path):
    path = tmp_path / "scores.sqlite"

    def work():
        with ScoreCache(path) as cache:
            for batch in range(200):
                cache.put("s", [(f"{batch}-{i}", "", float(i)) for i in range(20)])
                cache.put_features("s", [(f"{batch}-{i}", np.full(64, i, np.float32)) for i in range(20)])

    kill_until_done(work, random.Random(0), 3, 0.2)
    with ScoreCache(path) as cache:
        for batch in range(200):
            assert [cache.get(f"{batch}-{i}", "s", "") for i in range(20)] == [float(i) for i in range(20)]
            assert [cache.get_features(f"{batch}-{i}", "s").mean() for i in range(20)] == list(range(20))


@pytest.mark.parametrize("content", [b"not a database at all, but text", b"SQLite format 3\0" + bytes(200)])
def test_a_file_that_is_no_cache_is_one_line(tmp_path, content):
    (tmp_path / "scores.sqlite").write_bytes(content)
    with pytest.raises(UserError, match="cannot be used as a cache of scores"):
        ScoreCache(tmp_path / "scores.sqlite")
    with pytest.raises(UserError, match="cannot be used as a cache of scores"):
        ScoreCache(tmp_path)


def filled(path, count=4000):
    with ScoreCache(path) as cache:
        cache.put("s", [(str(number), "", float(number)) for number in range(count)])
    return path


def ask(path):
    """Every score of `filled`, and one more."""
    with ScoreCache(path) as cache:
        for number in range(4000):
            cache.get(str(number), "s", "")
        cache.put("s", [("one more", "", 1.0)])


@pytest.mark.parametrize("damage", ["cut", "noise", "zeros"])
def test_a_damaged_file_is_one_line(tmp_path, damage):
    """Beyond its first page, which is all that is looked at when it is opened."""
    data = filled(path := tmp_path / "scores.sqlite").read_bytes()
    middle = len(data) // 2
    changed = {
        "cut": data[:middle],
        "noise": data[:middle] + random.Random(0).randbytes(len(data) - middle),
        "zeros": data[:middle] + bytes(len(data) - middle),
    }[damage]
    path.write_bytes(changed)
    with pytest.raises(UserError, match=r"scores\.sqlite cannot be used as a cache of scores .*delete it") as caught:
        ask(path)
    assert "\n" not in str(caught.value)


def test_another_programs_database_is_left_as_it_is(tmp_path):
    path = tmp_path / "scores.sqlite"
    for words in ("CREATE TABLE places (url TEXT)", "CREATE TABLE scores (player TEXT, points INTEGER)"):
        path.unlink(missing_ok=True)
        with closing(sqlite3.connect(path)) as base:
            base.execute(words)
            base.commit()
        before = path.read_bytes()
        with pytest.raises(UserError, match="cannot be used as a cache of scores"):
            ScoreCache(path)
        assert path.read_bytes() == before


@pytest.mark.parametrize("value", ["'much'", "x'00'", "'nan'"])
def test_a_value_that_is_no_number_is_one_line(tmp_path, value):
    with closing(sqlite3.connect(filled(path := tmp_path / "scores.sqlite", 2))) as base:
        base.execute(f"UPDATE scores SET value = {value}")
        base.commit()
    with ScoreCache(path) as cache, pytest.raises(UserError, match="cannot be used as a cache"):
        cache.get("1", "s", "")


@pytest.mark.parametrize(
    ("pragma", "words"), [("query_only = 1", "readonly"), ("max_page_count = 1", "full")], ids=["read-only", "full"]
)
def test_a_file_that_cannot_grow_is_one_line(tmp_path, pragma, words):
    with ScoreCache(filled(tmp_path / "scores.sqlite")) as cache:
        cache._base.execute(f"PRAGMA {pragma}")
        with pytest.raises(UserError, match=rf"scores\.sqlite cannot be used as a cache of scores .*{words}"):
            cache.put("s", [(f"new {number}", "", 0.0) for number in range(10_000)])
        assert cache.get("7", "s", "") == 7.0 and cache.get("new 0", "s", "") is None


def test_the_scores_of_another_cache_are_taken(tmp_path):
    with ScoreCache(tmp_path / "other") as other:
        other.put("s", [(f"image {i}", "a fox", float(i)) for i in range(9000)])
        other.put_features("s", [("image", np.ones(3, np.float32))])
    with ScoreCache(tmp_path / "own") as own:
        own.put("s", [("mine", "a fox", -1.0)])
        assert own.take(tmp_path / "other") == 9001
        assert own.get("image 8999", "s", "a fox") == 8999.0 and own.get("mine", "s", "a fox") == -1.0
        assert own.get_features("image", "s").tolist() == [1, 1, 1]
        with pytest.raises(UserError, match="no scores are there"):
            own.take(tmp_path / "none")
