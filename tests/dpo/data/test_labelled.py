"""label.json: ours is known by its seal, somebody else's is left alone, a set that is not whole is not read."""

import json

import pytest

from dpo.common.errors import UserError
from dpo.data import labelled
from dpo.data.sources import open_source
from dpo.settings.config import Data
from dpo.settings.flags import parse
from tests.help import worlds

SCORERS = {"scorers": [{"name": "a", "asked": "a:FILE", "fingerprint": "a 1", "weight": 1.0}]}


def test_what_is_written_is_read_and_says_where_the_pairs_lie(tmp_path):
    assert labelled.read(tmp_path) is None and labelled.place(tmp_path) is None
    labelled.write(tmp_path, {"finished": True, "made_by": SCORERS})
    assert labelled.read(tmp_path)["made_by"] == SCORERS and labelled.place(tmp_path) == tmp_path / "data"
    labelled.write(tmp_path, {"finished": False})
    with pytest.raises(UserError, match="not all written: the same python -m dpo.label goes on"):
        labelled.place(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"what": "labelled pairs"}', '{"sha256": "x", "what": "else"}', "[" * 3000]
)
def test_another_programs_file_of_that_name_is_none_of_ours(tmp_path, text):
    (tmp_path / "label.json").write_text(text)
    assert labelled.read(tmp_path) is None and labelled.judges(tmp_path) == []


def test_a_changed_one_is_named(tmp_path):
    labelled.write(tmp_path, {"finished": True, "pairs": 3})
    path = tmp_path / "label.json"
    path.write_text(path.read_text().replace('"pairs": 3', '"pairs": 4'))
    with pytest.raises(UserError, match=r"label.json was changed"):
        labelled.read(tmp_path)
    assert labelled.judges(tmp_path) == []


def test_who_labelled_a_set_however_it_is_named(tmp_path):
    labelled.write(tmp_path, {"finished": True, "made_by": SCORERS})
    judges = [{"name": "a", "asked": "a:FILE", "fingerprint": "a 1"}]
    assert (
        labelled.judges(tmp_path)
        == labelled.judges(tmp_path / "data")
        == labelled.judges(tmp_path / "data" / "*.parquet")
        == judges
    )
    labelled.write(tmp_path, {"finished": False})
    assert labelled.judges(tmp_path) == []


def test_the_set_of_a_preset_that_is_not_made_yet_is_named_with_what_makes_it():
    with pytest.raises(
        UserError, match=r"runs/labels/pickscore: no such file .*; python -m dpo.label makes sets of labels"
    ):
        open_source(parse(["--preset", "sd15-pickscore"])[0].data)
    with pytest.raises(
        UserError, match=r"runs/stores/sdxl: no such file .*; python -m dpo.prepare makes prepared stores"
    ):
        open_source(parse(["--preset", "sdxl-24gb"])[0].data)


def test_a_folder_of_pairs_with_somebody_elses_label_json_is_read_as_ever(tmp_path):
    worlds.make_pickapic(tmp_path, 3)
    (tmp_path / "label.json").write_text(json.dumps({"0": "cat"}))
    assert len(open_source(Data(data=str(tmp_path)))) == 3
