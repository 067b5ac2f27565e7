"""The images that are scored: two of each pair, or those of several models one after another."""

import pytest

from dpo.common.errors import UserError
from dpo.data.labels import EVERY
from dpo.data.sources import open_source
from dpo.evaluating.sides import of_table
from dpo.labelling.items import OfPairs, OfSides
from dpo.settings.config import Data
from tests.help import worlds
from tests.help.labelling import images_of, rows


@pytest.mark.parametrize("ties", [0, 3])
def test_two_images_of_every_row(tmp_path, ties):
    worlds.make_pickapic(tmp_path, 5, ties=ties, unlabelled=2)
    items = OfPairs(open_source(Data(data=str(tmp_path), ties=EVERY)))
    found = rows(tmp_path)
    assert len(items) == 2 * len(found) == 2 * (7 + ties)
    for place, item in enumerate(items[i] for i in range(len(items))):
        row, side = found[place // 2], place % 2
        assert (item.caption, item.image.uid, item.image.load()) == (
            row["caption"],
            row[f"image_{side}_uid"],
            row[f"jpg_{side}"],
        )


def test_images_of_several_models(tmp_path):
    sides = [
        of_table(name, images_of(tmp_path / name, 2, count, seed=count), None) for name, count in (("a", 2), ("b", 3))
    ]
    items = OfSides(sides)
    assert len(items) == 10 and [items[i].model for i in (0, 3, 4, 9)] == ["a", "a", "b", "b"]
    assert items[5].image.load() == (tmp_path / "b" / "001.png").read_bytes() and items[5].caption == "prompt 0"
    prompts, prompt = items.prompts()
    assert prompts == ["prompt 0", "prompt 1"] and prompt.tolist() == [0, 0, 1, 1, 0, 0, 0, 1, 1, 1]


def test_the_fingerprint_knows_images_and_names_and_not_the_folder(tmp_path):
    place = images_of(tmp_path / "a", 2, 2)
    first = OfSides([of_table("a", place, None)]).fingerprint
    (tmp_path / "moved").mkdir()
    moved = place.rename(tmp_path / "moved" / "a")
    assert OfSides([of_table("a", moved, None)]).fingerprint == first
    assert OfSides([of_table("b", moved, None)]).fingerprint != first
    side = of_table("a", moved, None)
    (moved / "000.png").write_bytes(b"x")
    assert OfSides([of_table("a", moved, None)]).fingerprint != first
    (moved / "000.png").unlink()
    with pytest.raises(UserError, match=r"000.png cannot be read"):
        _ = OfSides([side]).fingerprint
