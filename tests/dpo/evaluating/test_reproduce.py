"""Published tables as data: complete, with what is unstated said, and a tolerance that two papers give."""

import pytest

from dpo.common.errors import UserError
from dpo.evaluating import reproduce
from dpo.scorers.scorer import LISTED


def test_every_table_says_how_it_was_made():
    for table in reproduce.tables().values():
        assert table.source.startswith("arXiv ") and table.statistic in ("mean", "median")
        assert {"prompts", "count", "sampler", "steps", "guidance", "seeds"} <= table.protocol.keys()
        assert "seeds" not in table.stated() and table.stated()["steps"] == 20
        assert all(isinstance(value, float) for scores in table.models.values() for value in scores.values())


def test_every_column_is_a_scorer_by_its_name():
    columns = {
        name: {scorer for scores in table.models.values() for scorer in scores}
        for name, table in reproduce.tables().items()
    }
    assert columns == {
        "lpo": {"pickscore", "imagereward", "hpsv2.0", "hpsv2.1", "aesthetic-v2"},
        "spo": {"pickscore", "imagereward", "hpsv2.1", "aesthetic-v2"},
    }
    assert set().union(*columns.values()) <= {one.name for one in LISTED}


def test_ours_beside_theirs():
    lines = reproduce.beside(
        reproduce.table("lpo"), {"SD1.5": {"pickscore": 20.50, "clip-h14": 0.3}, "mine": {"pickscore": 1}}
    )
    (line,) = lines
    assert (line.model, line.scorer, line.published) == ("SD1.5", "pickscore", 20.56)
    assert line.difference == pytest.approx(-0.06) and line.tolerance == pytest.approx(0.03)
    (line,) = reproduce.beside(reproduce.table("lpo"), {"SD2.1": {"pickscore": 20.92}})
    assert line.tolerance is None


def test_what_is_not_there_is_one_line():
    with pytest.raises(UserError, match="--reproduce dde: no such table; there are lpo, spo"):
        reproduce.table("dde")
    with pytest.raises(UserError, match=r"none of these models: call one NAME=MODEL, with a name of SD1\.5, "):
        reproduce.check(reproduce.table("spo"), ["mine"], ["pickscore"])
    with pytest.raises(UserError, match="--reproduce spo has no numbers by tiny-b: it has those by pickscore, "):
        reproduce.check(reproduce.table("spo"), ["SD1.5", "mine"], ["tiny-b"])
    reproduce.check(reproduce.table("spo"), ["SD1.5", "mine"], ["tiny-b", "pickscore"])
