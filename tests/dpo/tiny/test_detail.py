"""The second taste: what its pairs hold, that both measures of detail see it, and that the first taste does not."""

import io

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from dpo.data.writing import PICKAPIC
from dpo.scorers.scorer import opened
from dpo.tiny import build, detail, paths
from dpo.tiny.judge import load_judge, score
from dpo.tiny.making import detail as making

CPU = torch.device("cpu")


def pictures(files):
    return [Image.open(io.BytesIO(file)).convert("RGB") for file in files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    found = tmp_path_factory.mktemp("detail")
    making.write(found)
    return found


@pytest.fixture(scope="module")
def pairs(folder):
    return pq.read_table(folder / "train.parquet")


def test_a_rendition_changes_detail_alone():
    drawings = pictures(pq.read_table(paths.validation_pairs_path(), columns=["jpg_0"])["jpg_0"].to_pylist()[:20])
    for drawing in drawings:
        assert np.array_equal(making.rendition(drawing, 0), drawing)
        assert np.array_equal(np.asarray(making.rendition(drawing, -1)), detail.blurred(drawing).astype(np.uint8))
        made = [making.rendition(drawing, amount) for amount in np.linspace(*making.AMOUNTS, 5)]
        for taste in (detail.taste_a, detail.taste_b):
            assert (np.diff([taste(picture) for picture in made]) > 0).all()


def test_taste_b_does_not_see_contrast():
    drawings = pictures(pq.read_table(paths.validation_pairs_path(), columns=["jpg_0"])["jpg_0"].to_pylist()[:20])
    fainter = [Image.fromarray((np.asarray(one, np.float32) * 0.5 + 64).round().astype(np.uint8)) for one in drawings]
    moved = {}
    for taste in (detail.taste_a, detail.taste_b):
        moved[taste] = np.mean([taste(faint) - taste(whole) for faint, whole in zip(fainter, drawings, strict=True)])
    assert moved[detail.taste_a] == pytest.approx(np.log(0.5), abs=0.1) and abs(moved[detail.taste_b]) < 0.05


@pytest.mark.long
def test_both_pictures_are_one_drawing_of_the_first_pairs(pairs):
    assert pairs.schema.equals(PICKAPIC)
    shipped = pq.read_table(paths.train_pairs_path(), columns=["caption", "jpg_0"])
    assert pairs["caption"].to_pylist() == shipped["caption"].to_pylist()
    sides = [pictures(pairs[name].to_pylist()[:50]) for name in ("jpg_0", "jpg_1")]
    drawings = pictures(shipped["jpg_0"].to_pylist()[:50])

    def apart(some, others):  # in what a latent and more still hold of a picture, grey levels
        small = [
            [np.asarray(one.resize((8, 8), Image.Resampling.BOX), float) for one in side] for side in (some, others)
        ]
        return np.mean([abs(one - other).mean() for one, other in zip(*small, strict=True)])

    other = apart(
        drawings, pictures(pq.read_table(paths.train_pairs_path(), columns=["jpg_1"])["jpg_1"].to_pylist()[:50])
    )
    assert apart(drawings, sides[0]) < 0.15 * other and apart(*sides) < 0.2 * other
    amounts = [np.array([detail.taste_a(picture) for picture in side]) for side in sides]
    assert (amounts[0] - amounts[1]).std() > 0.3


def test_labels_are_as_noisy_as_the_first_taste_s(folder):
    for kind, count in (("train", 740), ("validation", 200)):
        table = pq.read_table(folder / f"{kind}.parquet")
        first, second = (
            np.array([detail.taste_a(picture) for picture in pictures(table[name].to_pylist())])
            for name in ("jpg_0", "jpg_1")
        )
        label = table["label_0"].to_numpy()
        assert len(label) == count and set(label) == {0.0, 1.0} and 0.82 < ((first > second) == label).mean() < 0.90
        said = 1 / (1 + np.exp(-detail.SLOPE * np.abs(first - second)))
        assert ((first > second) == label).mean() == pytest.approx(said.mean(), abs=0.05)
    train, held_out = (set(pq.read_table(folder / f"{kind}.parquet")["caption"].to_pylist()) for kind in making.KINDS)
    assert not train & held_out


@pytest.mark.long
def test_the_first_taste_hardly_sees_it(pairs):
    """What its judge scores differs between the pictures of a pair by a fraction of what it does between drawings."""
    judge = load_judge("b")

    def spread(table):
        sides = [np.stack([np.asarray(one) for one in pictures(table[name].to_pylist()[:200])]) for name in ("jpg_0", "jpg_1")]  # fmt: skip
        return np.subtract(*(score(judge.read(side)) for side in sides)).std()

    assert spread(pairs) < 0.5 * spread(pq.read_table(paths.train_pairs_path()))


def test_the_tastes_are_scorers(pairs):
    images = pictures(pairs["jpg_0"].to_pylist()[:5])
    found = {}
    for name, taste in (("tiny-detail-a", detail.taste_a), ("tiny-detail-b", detail.taste_b)):
        scorer = opened(name, device=CPU)
        assert scorer.name == name and scorer.fingerprint.startswith(name)
        found[name] = scorer.score(images=images, captions=["a red frog"] * 5)
        assert found[name].tolist() == pytest.approx([taste(image) for image in images])
    assert not torch.allclose(*found.values())
    assert opened("tiny-detail-a", device=CPU).temperature == detail.SLOPE
    flat = [Image.new("RGB", (64, 64), "red"), Image.new("RGB", (1, 40), "red"), Image.new("RGB", (40, 1), "red")]
    assert all(torch.isfinite(opened(name, device=CPU).score(images=flat, captions=[""] * 3)).all() for name in found)


@pytest.mark.long
def test_the_command_writes_the_same_again(folder, tmp_path, capsys):
    assert build.main(["--detail", str(tmp_path / "again")]) == 0
    for kind in making.KINDS:
        assert (tmp_path / "again" / f"{kind}.parquet").read_bytes() == (folder / f"{kind}.parquet").read_bytes()
    with pytest.raises(SystemExit):
        build.main(["--detail", str(tmp_path / "again" / "train.parquet")])
    assert "train.parquet: a folder is needed" in capsys.readouterr().err
