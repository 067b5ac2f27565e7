"""The benchmark of drawing and scoring runs from end to end and writes its table."""

import json

import pytest

from benchmarks import sampling

pytest.importorskip("resource", reason="POSIX alone says how much memory a process had")


@pytest.mark.slow
def test_few_images(tmp_path, capsys):
    assert sampling.main(["--drawn", "2", "--scored", "8", "40", "--out", str(tmp_path)]) == 0
    drawn, few, more = json.loads((tmp_path / "results.json").read_text())["sampling"]
    assert [row["images"] for row in (drawn, few, more)] == [2, 8, 40]
    assert 0 < drawn["outside UNet %"] < 100 and all(row["images/s"] > 0 for row in (drawn, few, more))
    assert all(100 < row["peak MiB"] < 4000 for row in (drawn, few, more)) and "KiB more an image" in more
    assert "| scoring | 40 |" in capsys.readouterr().out and (tmp_path / "sampling.md").is_file()
