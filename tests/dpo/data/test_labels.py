"""Columns are found by their usual names; labels say what to keep, which side won and how surely."""

import numpy as np
import pytest

from dpo.common.errors import UserError
from dpo.data.labels import SOFT, Columns, find_columns, read_labels
from dpo.settings.config import Data
from tests.help import worlds


def test_published_columns_are_found():
    found = find_columns(worlds.pickapic_schema(2).names, Data(), "here")
    assert (found.caption, found.first, found.second, found.label_0, found.uid_0) == (
        "caption", "jpg_0", "jpg_1", "label_0", "image_0_uid",
    )  # fmt: skip
    assert "jpg_0" not in found.decided_by
    assert find_columns(["prompt", "chosen", "rejected"], Data(), "here") == Columns("prompt", "chosen", "rejected")


def test_named_columns_come_first():
    names = [*worlds.pickapic_schema(2).names, "good", "bad", "words"]
    found = find_columns(names, Data(chosen_column="good", rejected_column="bad", caption_column="words"), "here")
    assert found == Columns("words", "good", "bad")
    with pytest.raises(UserError, match="found a, b"):
        find_columns(["a", "b"], Data(caption_column="nonesuch"), "here")


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["caption", "jpg_0", "jpg_1"], "auto"),
        (["prompt", "chosen"], "auto"),
        (["chosen", "rejected"], "auto"),
        ([], "auto"),
        (["prompt", "chosen", "rejected"], "pickapic"),
        (["caption", "jpg_0", "jpg_1", "label_0"], "chosen-rejected"),
    ],
)
def test_missing_columns_are_named_with_those_found(names, kind):
    with pytest.raises(UserError) as caught:
        find_columns(names, Data(), "set.parquet", kind)
    text = str(caught.value)
    assert text.startswith("set.parquet: needs the columns") and ", ".join(names) in text and "--caption-column" in text
    assert "\n" not in text


def test_a_ranking_is_sent_to_the_command_that_makes_pairs_of_it():
    words = (
        "is a ranking, one image in a line, and no pairs yet: make pairs of it with python -m dpo.pairs 'my set.csv'"
    )
    for names in (["image", "rank", "prompt"], ["File Name", "Score"]):
        with pytest.raises(UserError, match=words):
            find_columns(names, Data(), "my set.csv")
    for names, where in ((["image", "caption"], "my set.csv"), (["image", "rank", "prompt"], "set.parquet")):
        with pytest.raises(UserError, match="needs the columns"):
            find_columns(names, Data(), where)


def labels(label_0, label_1=None, ties="drop", **others):
    optional = [name if name in others else None for name in ("has_label", "are_different", "uid_0", "uid_1")]
    columns = Columns("caption", "a", "b", "label_0", None if label_1 is None else "label_1", *optional)
    table = {"label_0": np.array(label_0, dtype=float)} | {k: np.array(v, dtype=object) for k, v in others.items()}
    if label_1 is not None:
        table["label_1"] = np.array(label_1, dtype=float)
    return read_labels(table, columns, len(label_0), ties)


NAN = float("nan")


def test_labels():
    out = labels([1, 0, 0.5, NAN, 0.75, 0.2, 2, 0], [0, 1, 0.5, NAN, 0.25, 0.8, -1, 0])
    assert out.keep.tolist() == [True, True, False, False, True, True, False, False]
    assert out.swap[out.keep].tolist() == [False, True, False, True]
    assert np.allclose(out.prob[out.keep], [1, 1, 0.75, 0.8])
    assert out.counts == {"rows": 8, "ties": 1, "unlabelled": 1, "invalid labels": 2, "one image twice": 0}


def test_ties_kept_have_probability_one_half():
    out = labels([1, 0.5, 0.5], ties="keep")
    assert out.keep.all() and out.prob.tolist() == [1, 0.5, 0.5] and not out.swap[1:].any()
    assert out.counts["ties"] == 2


def test_rows_marked_unlabelled_are_left_out_whatever_their_label():
    out = labels([1, 1, 1], has_label=[True, False, None])
    assert out.keep.tolist() == [True, False, True] and out.counts["unlabelled"] == 1


def test_a_pair_of_one_image_is_left_out():
    out = labels([1, 1, 1], uid_0=["a", "b", None], uid_1=["a", "c", None])
    assert out.keep.tolist() == [False, True, True] and out.counts["one image twice"] == 1
    assert labels([1, 0], are_different=[False, True]).keep.tolist() == [False, True]


def test_probability_is_never_below_one_half():
    p = np.linspace(0, 1, 101)
    out = labels(p, 1 - p, ties="keep")
    assert (out.prob >= 0.5).all() and np.array_equal(out.swap, p < 0.499)


@pytest.mark.parametrize("words", [["False", "no", "0", "N"], ["false", "NO", "0.0", ""], [False, 0, 0.0, "f"]])
def test_flags_are_understood_in_words(words):
    out = labels([1, 1, 1, 1, 1, 1], has_label=[*words, "Yes", None])
    assert out.keep.tolist() == [False] * 4 + [True] * 2 and out.counts["unlabelled"] == 4
    assert labels([1, 0], are_different=["no", "true"]).keep.tolist() == [False, True]


def test_flags_as_numbers_with_nulls():
    columns = Columns("caption", "a", "b", "label_0", None, "has_label")
    out = read_labels({"label_0": np.ones(3), "has_label": np.array([0.0, 1.0, NAN])}, columns, 3, "drop")
    assert out.keep.tolist() == [False, True, True]


def test_flags_that_say_neither_are_refused():
    with pytest.raises(ValueError, match="has_label says 'perhaps', neither yes nor no"):
        labels([1], has_label=["perhaps"])


def test_labels_as_text_may_be_null():
    columns = Columns("caption", "a", "b", "label_0")
    out = read_labels({"label_0": np.array(["1", None, "0"], dtype=object)}, columns, 3, "drop")
    assert out.keep.tolist() == [True, False, True] and out.counts["unlabelled"] == 1


def of_p(p, label_0=None, ties="drop"):
    columns = Columns("caption", "a", "b", None if label_0 is None else "label_0", p="p")
    table = {"p": np.array(p, dtype=float)} | ({} if label_0 is None else {"label_0": np.array(label_0, dtype=float)})
    return read_labels(table, columns, len(p), ties)


def test_p_says_how_surely_and_the_label_which():
    out = of_p([0.9, 0.2, 0.52, NAN, 1.2, 0.4, 0.5, 0.7], [1, 0, 0.5, 0, 1, 1, 1, NAN])
    assert out.keep.tolist() == [True, True, False, True, False, False, True, False]
    assert out.swap[out.keep].tolist() == [False, True, True, False]
    assert np.allclose(out.prob[out.keep], [0.9, 0.8, 1.0, 0.5])
    assert out.counts == {"rows": 8, "ties": 1, "unlabelled": 1, "invalid labels": 2, "one image twice": 0, SOFT: 2}
    assert of_p([0.48, 0.52], [0.5, 0.5], "keep").prob == pytest.approx([0.52, 0.52])
    assert of_p([0.48, 0.52], [0.5, 0.5], "keep").swap.tolist() == [True, False]


def test_p_of_chosen():
    out = of_p([0.9, 0.2, 0.5, NAN])
    assert out.keep.tolist() == [True, True, False, True] and out.swap[out.keep].tolist() == [False, True, False]
    assert np.allclose(out.prob[out.keep], [0.9, 0.8, 1.0])


def test_columns_of_images_without_partners_are_named_where_they_may_be_meant():
    with pytest.raises(UserError) as caught:
        find_columns(["prompt", "photo", "verdict"], Data(), "here.csv")
    flags = "--caption-column, --chosen-column, --rejected-column"
    assert str(caught.value).endswith(f"{flags}, or of images without partners --single-image-column, --liked-column")
    assert find_columns(["prompt", "photo", "verdict"], Data(single_image_column="photo", liked_column="verdict"), "x")
    for kind in ("pickapic", "chosen-rejected"):
        with pytest.raises(UserError) as caught:
            find_columns(["prompt", "photo", "verdict"], Data(), "here.csv", kind)
        assert str(caught.value).endswith(flags)


def test_p_is_a_column_of_both_layouts_and_not_of_fingerprints():
    for names in (worlds.pickapic_schema(2).names, ["prompt", "chosen", "rejected"]):
        without, found = find_columns(names, Data(), "here"), find_columns([*names, "p"], Data(), "here")
        assert found.p == "p" and without.p is None and "p" in found.decided_by and repr(found) == repr(without)


def test_every_row_as_it_stands():
    out = labels([1, 0, 0.5, NAN, 2, 1], ties="every", uid_0=list("abcdef"), uid_1=list("uvwxyf"))
    assert out.keep.tolist() == [True] * 5 + [False] and not out.swap.any()
    assert np.allclose(out.prob[:5], [1, 0, 0.5, NAN, NAN], equal_nan=True)
    assert out.counts == {"rows": 6, "one image twice": 1}
