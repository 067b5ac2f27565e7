"""Whose labels a model was trained on: read from its run, whatever way the run names its pairs."""

from dataclasses import replace
from pathlib import Path

import pytest

from dpo.data import labelled
from dpo.data.store import fill
from dpo.data.store.store import merge
from dpo.evaluating.provenance import PAIRS, cautions, labelled_by, trained_on
from dpo.scorers.scorer import LISTED
from dpo.settings.config import from_mapping, to_toml
from dpo.tiny.paths import pipeline_path, train_pairs_path
from tests.help.stores import Encoders, Synthetic, task

EMBEDDED, DETAIL, PICKAPIC = PAIRS


def run(folder, **settings):
    """A run's folder, as far as its settings say."""
    folder.mkdir(parents=True)
    (folder / "config.toml").write_text(to_toml(from_mapping(settings)), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (None, {EMBEDDED}),
        (str(train_pairs_path()), {EMBEDDED}),
        (r"C:\venv\dpo\tiny\assets\pairs\train.parquet", {EMBEDDED}),
        ("liuhuohuo2/pick-a-pic-v2", {PICKAPIC}),
        ("/data/PickaPic_v1/*.parquet", {PICKAPIC}),
        ("/data/own.parquet", set()),
        ("x" * 5000, set()),
    ],
)
def test_the_pairs_of_a_run_by_what_it_says_of_them(tmp_path, data, found):
    folder = run(tmp_path / "run", data=data)
    assert trained_on(folder) == trained_on(folder / "unet") == found
    assert trained_on(folder / "pytorch_lora_weights.safetensors") == found


def test_what_is_no_run_was_trained_on_nothing_known(tmp_path):
    (tmp_path / "config.toml").write_text("[data]\nsteps = 3\n")  # another program's
    for place in (
        tmp_path,
        tmp_path / "none",
        pipeline_path(),
        Path("embedded"),
        Path("owner/model"),
        Path("x" * 5000),
    ):
        assert trained_on(place) == set()


def test_a_run_that_went_on_from_another_was_trained_on_its_pairs_too(tmp_path):
    first = run(tmp_path / "first", data="yuvalkirstain/pickapic_v1")
    second = run(tmp_path / "second", data="/own", unet_init=str(first / "unet"))
    third = run(tmp_path / "third", data=None, model=str(second))
    assert trained_on(second) == {PICKAPIC} and trained_on(third) == {EMBEDDED, PICKAPIC}
    around = run(tmp_path / "around", data="/own", model=str(tmp_path / "around"))
    assert trained_on(around) == set()


def test_a_prepared_store_says_what_it_was_made_of(tmp_path):
    store = tmp_path / "store"
    fill.fill(replace(task(store, Synthetic(6), Encoders()), name="liuhuohuo2/pick-a-pic-v2"))
    merge(tmp_path / "merged", [store])
    assert trained_on(run(tmp_path / "run", data=str(store))) == {PICKAPIC}
    assert trained_on(run(tmp_path / "other", data=str(tmp_path / "merged"))) == {PICKAPIC}
    (store / "store.json").write_text("{")
    assert trained_on(run(tmp_path / "damaged", data=str(store))) == set()


def test_a_scorer_that_labelled_the_pairs_or_learned_from_them_is_named(tmp_path):
    one, two = run(tmp_path / "one", data=None), run(tmp_path / "two", data="pick-a-pic")
    places = {"start": "embedded", "one": str(one), "two": str(two), "three": str(one)}
    assert cautions(["tiny-a", "tiny-b", "tiny-a:x", "my:own"], places) == [
        "tiny-a labelled the embedded pairs, which one and three were trained on: a gain by it is expected, and other "
        "scorers say more"
    ]
    assert cautions(["pickscore:/weights", "clip-h14"], places) == [
        "pickscore learned from Pick-a-Pic, which two was trained on: a gain by it is expected, and other scorers say more"
    ]
    detail = run(tmp_path / "fine", data="runs/detail/train.parquet")
    assert trained_on(detail) == {DETAIL}
    assert cautions(["tiny-a", "tiny-detail-a", "tiny-detail-b"], {"fine": str(detail)}) == [
        "tiny-detail-a labelled the embedded pairs of detail, which fine was trained on: a gain by it is expected, and other "
        "scorers say more"
    ]
    assert cautions(["tiny-a", "pickscore"], {"start": "embedded", "theirs": str(tmp_path)}) == []


def test_the_list_names_pairs_that_are_known():
    assert {name for one in LISTED for name in (*one.labelled, *one.learned)} == set(PAIRS)


def test_sets_that_dpo_label_made_say_who_labelled_them(tmp_path):
    scorers = [
        {"name": "hpsv2.1", "asked": "hpsv2.1:/weights", "fingerprint": "hps 1"},
        {"name": "own", "asked": "my:own", "fingerprint": "own 1"},
    ]
    sets = tmp_path / "labels"
    sets.mkdir()
    labelled.write(sets, {"finished": True, "made_by": {"scorers": scorers}})
    store, merged = tmp_path / "store", tmp_path / "merged"
    fill.fill(replace(task(store, Synthetic(6), Encoders()), name=str(sets)))
    merge(merged, [store])
    runs = {
        name: str(run(tmp_path / name, data=str(data)))
        for name, data in {"a": sets, "b": sets / "data", "c": store, "d": merged, "e": tmp_path}.items()
    }
    runs["f"] = str(run(tmp_path / "f", data="/own", model=runs["a"]))
    assert cautions(["hpsv2.1:/elsewhere", "tiny-b", "my:own", "other:name"], runs, {"other:name": "own 1"}) == [
        f"{name} labelled the pairs that a and b and c and d and f were trained on: a gain by it is expected, and other "
        "scorers say more"
        for name in ("hpsv2.1", "my:own", "other:name")
    ]
    (sets / "label.json").unlink()
    assert labelled_by(Path(runs["c"])) == labelled_by(Path(runs["d"])) != set(), "the store keeps it"
    assert labelled_by(Path(runs["a"])) == labelled_by(Path(runs["e"])) == labelled_by(tmp_path / "none") == set()
