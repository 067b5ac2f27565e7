"""dpo.data.held_out: how many of one's own pairs are held out, which, and what the log says of it."""

import logging
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.data import held_out
from dpo.data.pairs import caption_key
from dpo.data.sources import describe, open_sources
from dpo.settings.config import Data
from tests.help import worlds


class Pairs(SimpleNamespace):
    """A set of pairs by their captions alone."""

    def __len__(self):
        return len(self.captions)

    def caption_keys(self):
        return np.array([caption_key(caption) for caption in self.captions], dtype=np.int64)


def pairs(captions, ties=()):
    prob = np.ones(len(captions), dtype=np.float32)
    prob[list(ties)] = 0.5
    return Pairs(captions=list(captions), prob=prob, sides=2)


def unique(n):
    return [f"caption {i}" for i in range(n)]


def chosen(source, **settings):
    """(settings with the share decided, places of the pairs to train on, places of those held out or None)."""
    data = held_out.decide(Data(data="d", **settings), source)
    train, out = held_out.split(data, source)
    return data, set(range(len(source)) if train is source else train.indices), out and set(out.indices)


@pytest.mark.parametrize("n", [150, 151, 160, 333, 500, 501, 999, 2560, 4000])
@pytest.mark.parametrize("by", ["caption", "pair"])
def test_a_tenth_but_at_least_fifty_and_no_more_than_are_measured(n, by):
    source = pairs(unique(n) if by == "caption" else ["one"] * n)
    data, train, out = chosen(source)
    assert len(out) == min(max(50, -(-n // 10)), 256) and len(out) <= n / 3
    assert train | out == set(range(n)) and not train & out
    assert data.validation_by == by and 0 < data.validation_fraction <= 0.5
    again = replace(Data(data="d"), validation_fraction=data.validation_fraction, validation_by=data.validation_by)
    assert held_out.decide(again, source) == again
    assert set(held_out.split(again, source)[1].indices) == out, "as a resumed run reads it"


def test_none_of_a_few_pairs_unless_asked(caplog):
    caplog.set_level(logging.INFO, "dpo")
    for source in (pairs(unique(149)), pairs(unique(160), ties=range(11))):
        data, train, out = chosen(source)
        assert out is None and data.validation_fraction == 0 and len(train) == len(source)
    assert "none of 149 pairs; below 150 it takes --validation-fraction" in caplog.text
    data, train, out = chosen(pairs(unique(56)), validation_fraction=0.2)
    assert data.validation_fraction == 0.2 and 4 <= len(out) <= 20 and len(train) + len(out) == 56


def test_what_was_said_is_left_alone():
    for said in ({"validation_fraction": 0.0}, {"validation_fraction": 0.3}):
        data = Data(data="d", **said)
        assert held_out.decide(data, pairs(unique(1000))) == data
    named = held_out.decide(Data(data="d", validation_data="v"), pairs(unique(1000)))
    assert named.validation_fraction == 0 and named.validation_data == "v"
    assert len(chosen(pairs(unique(1000)), validation_pairs=20)[2]) == 20


def test_ties_are_on_neither_side_of_a_held_out_caption():
    source = pairs(unique(600), ties=range(0, 600, 3))
    _, train, out = chosen(source)
    assert len(out) == 50 and not out & set(range(0, 600, 3)) and not train & out


@pytest.mark.parametrize("sizes", [[1] * 200, [2] * 100, [5] * 40, [10] * 30, [40, 10] * 12])
def test_whole_captions_where_they_allow_it(sizes):
    captions = [f"caption {i}" for i, size in enumerate(sizes) for _ in range(size)]
    data, train, out = chosen(pairs(captions))
    assert data.validation_by == "caption" and 50 <= len(out) <= len(captions) / 3
    assert not {captions[i] for i in train} & {captions[i] for i in out}


@pytest.mark.parametrize(("n", "size"), [(150, 4), (152, 4), (156, 8), (160, 6), (165, 15), (170, 12)])
def test_a_few_less_than_fifty_before_a_caption_is_on_both_sides(n, size):
    captions = [f"caption {i // size}" for i in range(n)]
    data, train, out = chosen(pairs(captions))
    assert data.validation_by == "caption" and 40 <= len(out) <= n / 3
    assert not {captions[i] for i in train} & {captions[i] for i in out}
    assert set(held_out.split(replace(data), pairs(captions))[1].indices) == out, "as a resumed run reads it"


def test_far_less_than_fifty_are_no_reason_to_keep_captions_whole():
    assert chosen(pairs([f"caption {i // 30}" for i in range(150)]))[0].validation_by == "pair"


@pytest.mark.parametrize(
    ("captions", "words"),
    [
        ([""] * 300, "each pair alone: they have no captions; an image may be on both sides"),
        (["a fox"] * 300, "each pair alone: they have one caption; an image may be on both sides"),
        (
            ["a fox"] * 150 + ["a cat"] * 150,
            "each pair alone, so that a caption may be on both sides, and an image too",
        ),
        (unique(300), "by caption: none is on both sides"),
    ],
)
def test_sets_of_too_few_captions_are_split_by_pair_and_the_log_says_so(captions, words, caplog):
    caplog.set_level(logging.INFO, "dpo")
    _, _, out = chosen(pairs(captions))
    assert len(out) == 50 and f"held out: 50 of 300 pairs (17 %), {words}" in caplog.text


def test_a_share_that_was_asked_for_is_split_by_pair_too_where_captions_forbid_it():
    for captions in ([""] * 40, ["a fox"] * 40):
        data, train, out = chosen(pairs(captions), validation_fraction=0.25)
        assert 3 <= len(out) <= 20 and len(train) + len(out) == 40 and data.validation_by == "auto"
        with pytest.raises(UserError, match="leaves none for"):
            chosen(pairs(captions), validation_fraction=0.25, validation_by="caption")
    _, train, out = chosen(pairs(unique(40)), validation_fraction=0.25, validation_by="pair")
    assert 3 <= len(out) <= 20


def test_a_share_that_was_asked_for_chooses_as_earlier_versions_did():
    """Literal places, written down by the version before pairs could be held out singly: old runs go on with them."""
    _, _, out = chosen(pairs(unique(20)), validation_fraction=0.3)
    assert out == {2, 3, 5, 9, 15, 17, 18}


def test_rows_that_are_no_pairs_to_train_on_say_why(tmp_path, settings):
    folder = worlds.make_folders(tmp_path, 160)
    assert describe(open_sources(settings(folder)).train).startswith("160 rows: 110 pairs; left out: 50 as held out;")
    said = describe(open_sources(settings(folder, max_pairs=155)).train)
    assert said.startswith("160 rows: 105 pairs; left out: 50 as held out, 5 by --max-pairs;")


def test_folders_without_captions_hold_pairs_out(tmp_path, settings):
    train, held, data = open_sources(settings(worlds.make_folders(tmp_path, 160, captions_in="none")))
    assert (len(train), len(held), data.validation_by) == (110, 50, "pair")
    assert not {train[i].key for i in range(110)} & {held[i].key for i in range(50)}
    assert {held[i].caption for i in range(50)} == {""}


def test_a_share_of_captions_that_is_far_from_one_of_pairs_is_said_with_a_nearer_one(caplog):
    source = pairs([f"caption {i}" for i in range(10) for _ in range(i * i // 4 + 1)])
    _, _, out = chosen(source, validation_fraction=0.2)
    wanted = 0.2 * len(source)
    assert abs(len(out) - wanted) > 0.2 * wanted, "a set on which the share is rough"
    (line,) = [record.getMessage() for record in caplog.records if "share of captions" in record.getMessage()]
    better, count = line.split(": ")[1].split(" holds out ")
    _, _, nearer = chosen(source, validation_fraction=float(better))
    assert len(nearer) == int(count.split()[0]) and abs(len(nearer) - wanted) < abs(len(out) - wanted)
    caplog.clear()
    chosen(pairs(unique(400)), validation_fraction=0.2)
    assert "share of captions" not in caplog.text
