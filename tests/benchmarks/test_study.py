"""The study's report: figures, verdicts and rows that have not been run, from run folders made up for it."""

import json
import threading
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import scipy.stats

from benchmarks import claims, evidence, study
from benchmarks.study_rows import SEGMENTS
from dpo.tiny import paths
from tests.help.fake_run import write_run

APART = {"": [1.0] * 10, study.DETAIL: list(np.linspace(1.0, 0.55, 10))}


def cell(folder, row, win_rate, kind="good"):
    """What the study keeps of a finished run."""
    write_run(folder, kind, updates=8, batch=4)
    summary = json.loads((folder / "summary.json").read_text())
    interval = [win_rate - 0.05, win_rate + 0.05]
    found = {
        "win_rate": win_rate,
        "win_rate_interval": interval,
        "prompts": 160,
        "score_before": 1.0,
        "score_after": 1.0 + 2 * (win_rate - 0.5),
        "faithfulness_before": 0.9,
        "faithfulness_after": 0.8,
    }
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "finished", "evaluation": found}))
    return study.finished_cell(folder, row)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A file of finished cells."""
    out = tmp_path_factory.mktemp("study")
    cells = {"dpo": {}, "sft": {}}
    for seed, (dpo, sft) in enumerate([(0.8, 0.6), (0.7, 0.65), (0.75, 0.6)]):
        cells["dpo"][seed] = cell(study.folder_of(out, "dpo", seed), "dpo", dpo)
        cells["sft"][seed] = cell(study.folder_of(out, "sft", seed), "sft", sft)
    cells["dde"] = {0: cell(study.folder_of(out, "dde", 0), "dde", 0.9, kind="dde")}
    study.write_cells(out / "cells.json", cells)
    return out / "cells.json"


def test_only_finished_runs_count(tmp_path):
    assert study.finished_cell(tmp_path, "dpo") is None
    for kind in ("early", "failed"):
        assert study.finished_cell(write_run(tmp_path / kind, kind, updates=8, batch=4), "dpo") is None


def test_cells_of_other_flags_do_not_count(path, tmp_path):
    known = json.loads(path.read_text())
    known["dpo"]["1"]["flags"] = ["--method", "dpo", "--beta", "1"]
    (tmp_path / "cells.json").write_text(json.dumps(known | {"a row of before": known["sft"]}))
    cells = study.read_cells(tmp_path / "cells.json")
    assert sorted(cells["dpo"]) == [0, 2] and sorted(cells["sft"]) == [0, 1, 2] and list(cells) == list(study.ROWS)


def test_the_table_s_history_is_told_by_the_run(tmp_path):
    """In a run whose table holds the d that its margins tell, what was measured is what the table says."""
    row = "dde-step"
    cell(tmp_path / "run", row, 0.8, kind="dde")
    config = (tmp_path / "run" / "config.toml").read_text()
    (tmp_path / "run" / "config.toml").write_text(config.replace('method = "dde"', 'method = "dde-step"'))
    beta, d, pairs = (
        study.read_run(tmp_path / "run").setting("beta"),
        -1e-4 * np.arange(1, 11),
        [3, 0, 1, 1, 1, 1, 1, 1, 1, 1],
    )
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for n, line in enumerate(line for line in lines if "margin_by_decile" in line):
        correction = np.full(10, -1e-5 * (n + 1))
        z = [None if not count else value for count, value in zip(pairs, -(beta / 2) * (d + correction), strict=True)]
        line |= {
            "table_by_decile": list(d),
            "correction_by_decile": list(correction),
            "margin_by_decile": z,
            "pairs_by_decile": pairs,
        }
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = study.finished_cell(tmp_path / "run", row)
    assert np.allclose(found["measured"], np.where(np.array(pairs) > 0, d, 0), rtol=1e-9)
    assert np.shape(found["table"]) == np.shape(found["correction"]) == (4, 10)
    assert np.allclose([quarter[0] for quarter in found["correction"]], [-2e-5, -4e-5, -6e-5, -8e-5])


def test_what_is_said_of_a_table():
    falling = -np.arange(10.0, 0, -1)
    found = {
        "table": np.stack([falling * share for share in (0.2, 0.4, 0.45, 0.45)]),
        "correction": np.stack([falling * share for share in (1, 2, 4, 5)]),
        "measured": falling / 2,
    }
    text = "\n".join(evidence.describe_tables({"dde-step": found}))
    assert "| d, dde-step | M, dde-step | C, dde-step |" in text and "| 0 to 10 % | -5 | -4.5 | -50 |" in text
    assert "|C| falls from tenth to tenth of t (50 in the first, 5 in the last)" in text
    assert "is 5.5, 11, 22, 27.5, the last quarter changed it by +25%. M is 90% of the d it estimates." in text
    found["correction"] = found["correction"][:, ::-1]
    assert "|C| does not fall everywhere from tenth" in evidence.describe_tables({"dde": found})[-1]


@pytest.fixture
def trained(monkeypatch):
    """What dpo.train was asked to do; it leaves a finished run behind, or ends with the code given."""
    from dpo import train

    asked, codes = [], []

    def main(flags):
        asked.append(flags)
        folder = Path(flags[flags.index("--output") + 1])
        cell(folder, "dpo", 0.8)
        (folder / "checkpoints" / "step-8").mkdir(parents=True, exist_ok=True)
        return codes.pop() if codes else 0

    monkeypatch.setattr(train, "main", main)
    return asked, codes


def test_a_cell_is_continued_under_the_same_flags_only(trained, tmp_path, monkeypatch):
    asked, codes = trained
    codes.append(130)
    found, line = study.run_cell(tmp_path, "dpo", 0)
    assert found is None and "ended with 130" in line and "--overwrite" in asked[-1]
    found, line = study.run_cell(tmp_path, "dpo", 0)
    assert (
        found["win_rate"] == 0.8
        and found["flags"] == study.ROWS["dpo"]
        and line.endswith("done")
        and "--resume" in asked[-1]
    )
    monkeypatch.setitem(study.ROWS, "dpo", ["--method", "dpo", "--beta", "5"])
    found, _ = study.run_cell(tmp_path, "dpo", 0)
    assert found["flags"] == ["--method", "dpo", "--beta", "5"] and "--overwrite" in asked[-1]
    monkeypatch.setattr(study, "_stop", threading.Event())
    study._stop.set()
    assert study.run_cell(tmp_path, "dpo", 1) == (None, "dpo, seed 1: not started") and len(asked) == 3


def test_cells_of_another_judge_do_not_count(path, tmp_path, monkeypatch):
    """What measured detail before is no figure of what measures it now, though the flags are the same."""
    row, old = f"dpo{study.DETAIL}", "tiny-detail-b percentile 95"
    cells = json.loads(path.read_text()) | {
        row: {
            str(seed): {"flags": study.ROWS[row], "win_rate": 0.9, **by}
            for seed, by in enumerate(({}, {"judged_by": old}, {"judged_by": study.fingerprint_of("tiny-detail-b")}))
        }
    }
    (tmp_path / "cells.json").write_text(json.dumps(cells))
    assert sorted(study.read_cells(tmp_path / "cells.json")[row]) == [2]

    def main(flags):
        folder = Path(flags[flags.index("--output") + 1])
        cell(folder, row, 0.8)
        told = {"scorers": [{"fingerprint": made.pop(0)}]}
        (folder / "evaluation").mkdir(exist_ok=True)
        (folder / "evaluation" / "evaluation.json").write_text(json.dumps(told))
        (folder / "checkpoints" / "step-8").mkdir(parents=True, exist_ok=True)
        asked.append(flags)

    made, asked = [old, study.fingerprint_of("tiny-detail-b")], []
    monkeypatch.setattr("dpo.train.main", main)
    found = [study.run_cell(tmp_path, row, 0)[0] for _ in range(2)]
    assert [study.is_current(row, one) for one in found] == [False, True] and found[1][
        "judged_by"
    ] == study.fingerprint_of("tiny-detail-b")
    assert "--resume" in asked[1] and len(found[1]["measured"]) == 10


def test_a_row_stands_on_its_finished_seeds(path):
    lines = {line["method"]: line for line in claims.table_of(study.read_cells(path))}
    assert list(lines) == list(study.ROWS)
    assert lines["dpo"]["seeds"] == 3 and lines["dpo"]["win rate"] == pytest.approx(0.75)
    assert lines["dpo"]["lowest bound of a seed"] == pytest.approx(0.65) and lines["dpo"]["over seeds"] == "± 0.050"
    low, high = map(float, lines["dpo"]["95 % interval"].split(" to "))
    assert 0.67 < low < 0.69 and 0.80 < high < 0.82  # Wilson, 160 prompts
    assert lines["dpo"]["score"] == "+0.500 ± 0.100"
    assert lines["dde"]["seeds"] == 1 and lines["dde"]["over seeds"] is None and lines["dde"]["score"] == "+0.800"
    assert lines["discounted"] == {"method": "discounted", "seeds": "not yet run"}


def test_a_claim_holds_only_where_its_interval_excludes_nothing(path):
    """0.2, 0.05 and 0.15 between the seeds: 0.1333 with a standard error of 0.0441, times Student's 4.303 for three."""
    results = study.read_cells(path)
    found = claims.check(claims.Claim("", ["dpo"], ["sft"]), results)
    assert found["win rate"] == "+0.133 ± 0.190" and found["by win rate"] == "undecided" and found["seeds"] == 3
    assert found["score"] == "+0.267 ± 0.379" and found["by score"] == "undecided"
    for seed, cell in results["sft"].items():
        cell["win_rate"] = results["dpo"][seed]["win_rate"] - 0.1 - 0.01 * seed
    assert claims.check(claims.Claim("", ["dpo"], ["sft"]), results)["by win rate"] == "holds"
    assert claims.check(claims.Claim("", ["sft"], ["dpo"]), results)["by win rate"] == "does not hold"
    against = {line["method"]: line for line in claims.against_dpo(results, "")}
    assert (
        against["sft"]["by win rate"] == "below" and "dpo" not in against and against["kto"]["seeds"] == "not yet run"
    )
    assert claims.check(claims.Claim("", ["dpo"], ["dpo"]), results)["by score"] == "undecided"
    one = claims.check(claims.Claim("", ["dde"], ["dpo"]), results)
    assert one["seeds"] == 1 and one["win rate"] == "+0.100" and "by win rate" not in one
    assert claims.check(claims.Claim("", ["discounted"], ["dpo"]), results)["seeds"] == "not yet run"


def test_the_quantiles_are_student_s():
    """Each tells what it should of many samples drawn here: 95 % of them have the mean within."""
    rng = np.random.default_rng(0)
    for count, quantile in claims.T95.items():
        assert claims.t95(count) == quantile
        drawn = rng.normal(size=(200_000, count))
        within = np.abs(drawn.mean(1)) <= quantile * drawn.std(1, ddof=1) / count**0.5
        assert within.mean() == pytest.approx(0.95, abs=0.002)
    for count in (11, 12, 20, 100):
        assert claims.t95(count) == pytest.approx(scipy.stats.t.ppf(0.975, count - 1), abs=1e-3)


def test_more_seeds_than_the_table_has_are_compared_too(path):
    results = study.read_cells(path)
    for row, rate in (("dpo", 0.8), ("sft", 0.7)):
        results[row] = {
            seed: results["dpo"][0] | {"win_rate": rate + 0.001 * seed * (row == "dpo")} for seed in range(12)
        }
    assert claims.check(claims.Claim("", ["dpo"], ["sft"]), results)["by win rate"] == "holds"


def test_where_a_taste_lives(path):
    results = study.read_cells(path)
    for found in results["dpo"].values():
        found["measured"] = list(np.arange(1.0, 11))
    results[SEGMENTS[3] + study.DETAIL] = results["sft"]
    lines = evidence.where(results, APART)
    seeds = len(results["dpo"])
    assert lines[9]["d, first"] == f"{10 / 55:.1%} ({seeds})" and "d, detail" not in lines[9]
    assert lines[3]["rises by, detail"] == "+0.233" and "rises by, detail" not in lines[4]
    assert lines[9]["told apart, first"] == "1.00" and lines[9]["told apart, detail"] == "0.55"


def test_cells_that_lack_a_figure_are_run_again(path):
    cells = study.read_cells(path)
    assert study.missing(cells, "sft", 7) and not study.missing(cells, "sft", 0) and not study.missing(cells, "dpo", 0)
    del cells["dpo"][0]["measured"]
    assert study.missing(cells, "dpo", 0)


def test_every_claim_and_flag_names_something_that_exists():
    from dpo.settings.flags import parse

    assert {row for claim in (*claims.FIRST, *claims.SECOND) for row in claim.better + claim.worse} <= set(study.ROWS)
    for flags in study.ROWS.values():
        parse(["--preset", "tiny", *flags])


@pytest.mark.long
def test_report_without_running_anything(path, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(study, "told_apart", lambda pairs: APART[study.DETAIL if "detail" in str(pairs) else ""])
    page = tmp_path / "docs" / "evidence.md"
    assert study.main(["--out", str(tmp_path), "--cells", str(path), "--seeds", "0", "--report", str(page)]) == 0
    text = page.read_text()
    assert "| dpo | 3 | 0.75 |" in text and "| discounted | not yet run |" in text and "(evidence.png)" in text
    assert "| 90 to 100 % | 1.00 |" in text and "`dde`: |C| " in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    assert "| dpo | 3 |" in capsys.readouterr().out


@pytest.mark.long
def test_soft_labels_are_the_taste_s_probabilities(tmp_path):
    hard = pq.read_table(paths.train_pairs_path(), columns=["label_0"])["label_0"].to_numpy()
    table = pq.read_table(study.soft_pairs(tmp_path / "soft.parquet"), columns=["label_0", "label_1"])
    first, second = table["label_0"].to_numpy(), table["label_1"].to_numpy()
    assert abs(first + second - 1).max() < 1e-6 and ((first > 0) & (first < 1)).mean() > 0.9
    clear = hard != 0.5
    assert 0.75 < ((first > 0.5) == (hard > 0.5))[clear].mean() < 0.99  # the labels were drawn, not decided


def test_swapped_labels_are_the_shipped_ones_the_other_way_round(tmp_path):
    shipped = pq.read_table(paths.train_pairs_path())
    table = pq.read_table(study.swapped_pairs(tmp_path / "swapped.parquet"))
    assert table["label_0"].to_pylist() == shipped["label_1"].to_pylist() != shipped["label_0"].to_pylist()
    assert table["label_1"].to_pylist() == shipped["label_0"].to_pylist()
    assert table["jpg_0"].to_pylist() == shipped["jpg_0"].to_pylist()
    stores = {row: study.store_of(tmp_path, row).name for row in ("dpo", "dpo, soft labels", "dpo, swapped labels")}
    assert list(stores.values()) == ["store", "store-soft", "store-swapped"]


def test_rows_of_other_labels_have_stores_of_their_own(tmp_path):
    rows = [row for row in study.ROWS if study.labels_of(row)]
    assert {study.labels_of(row) for row in rows} == set(study.LABELS)
    assert all(study.labels_of(row) == "detail" for row in study.ROWS if evidence.taste_of(row) == study.DETAIL)
    assert len({study.store_of(tmp_path, row) for row in [*rows, "dpo"]}) == 1 + len(study.LABELS)


@pytest.mark.slow
def test_judged_labels_are_those_of_the_labelling_judge(tmp_path):
    folder = study.labelled_pairs(tmp_path / "judged.parquet")
    table = pq.read_table(folder / "data")
    shipped = pq.read_table(paths.train_pairs_path())
    assert table["image_0_uid"].to_pylist() == shipped["image_0_uid"].to_pylist()
    first, old = table["label_0"].to_numpy(), table["old_label_0"].to_numpy()
    apart = table["score_0"].to_numpy() - table["score_1"].to_numpy()
    assert ((first == (apart > 0)) | (abs(apart) <= 1e-3)).all() and (old == shipped["label_0"].to_numpy()).all()
    assert 0.7 < (first == old).mean() < 0.95, "people are noisy"
