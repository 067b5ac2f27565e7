"""The tables of a sweep: one of its runs, one over the seeds."""

import json
from pathlib import Path

from dpo.pages import sweep as sweep_page
from dpo.pages.sweep import name_of
from dpo.sweep import cells


def test_a_second_table_is_over_the_seeds(tmp_path):
    """A row for each combination of the other axes, of finished runs alone."""
    runs = cells({"loss": ["sigmoid", "ipo"], "seed": ["0", "1", "2"]})
    for cell, loss, status in zip(runs, (0.5, 0.6, 0.85, 0.7, 9, 9), ["finished"] * 4 + ["failed"] * 2, strict=True):
        folder = tmp_path / name_of(cell)
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": loss, "seconds": 2.0}) + "\n")
        won = {"evaluation": {"win_rate": 0.75}} if cell["seed"] == "0" else {}
        (folder / "summary.json").write_text(json.dumps({"status": status, **won}))
    sweep_page.compare(tmp_path, runs)
    first, second = (tmp_path / "sweep.md").read_text().split(f"\n{sweep_page.OVER_SEEDS}\n\n")
    head, _, *rows = ([cell.strip() for cell in line.split("|")[1:-1]] for line in second.splitlines())
    assert head == ["--loss", "n", *first.splitlines()[0].split(" | ")[4:-1]] and len(first.splitlines()) == 8
    sigmoid, ipo = (dict(zip(head, row, strict=True)) for row in rows)
    assert (sigmoid["--loss"], sigmoid["n"], ipo["--loss"], ipo["n"]) == ("sigmoid", "3", "ipo", "1")
    assert sigmoid["loss"] == "0.65 ± 0.18"  # sqrt((0.15^2 + 0.05^2 + 0.2^2) / 2)
    assert (ipo["loss"], sigmoid["seconds"], sigmoid["margin"]) == ("0.7 ± -", "2 ± 0", "")
    assert (sigmoid["win rate"], ipo["win rate"]) == ("0.75 ± - (n = 1)", "0.75 ± -")


def test_seeds_alone_are_one_row_and_without_them_there_is_no_second_table():
    def rows(runs):
        return [sweep_page.row(Path("nowhere"), cell) for cell in runs]

    seeds, betas = cells({"seed": ["0", "1"]}), cells({"beta": ["1", "2"]})
    (one,) = sweep_page.over_seeds(seeds, rows(seeds))
    assert list(one) == ["n", *sweep_page.COLUMNS] and one["n"] == "0" and set(one.values()) == {"0", ""}
    assert sweep_page.over_seeds(betas, rows(betas)) == []


def test_the_seconds_of_a_row_are_those_of_every_start(tmp_path):
    """summary.json knows the last start alone; each update has its own in metrics.jsonl, of which some are logged."""
    lines = [{"step": step, "loss": 0.5, "pairs": 4, "seconds": 2.0} for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "summary.json").write_text(json.dumps({"status": "finished", "seconds": 3.0, "steps": 6}))
    assert sweep_page.row(tmp_path, {"beta": "1"})["seconds"] == 12.0
