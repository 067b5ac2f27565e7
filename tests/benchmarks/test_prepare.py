"""The benchmark of prepared stores runs from end to end and writes its table."""

import json

import pytest

from benchmarks import prepare


@pytest.mark.slow
def test_the_tiny_size(tmp_path, capsys):
    assert prepare.main(["--size", "tiny", "--steps", "2", "--out", str(tmp_path)]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())["prepare"]
    assert row["images / recorded, FLOPs"] > row["prepared / recorded, FLOPs"] > 1.3
    assert 0 < row["host, CPU %"] < 100 and row["images, CPU s"] > 0
    assert "| tiny |" in capsys.readouterr().out and (tmp_path / "prepare.md").is_file()
