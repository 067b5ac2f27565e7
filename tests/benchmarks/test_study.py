"""The study's report: figures, verdicts and rows that have not been run, from run folders made up for it."""

import json

import pytest

from benchmarks import study
from tests.dpo.fake_run import write_run


def cell(out, row, seed, win_rate, kind="good"):
    folder = study.folder_of(out, row, seed)
    write_run(folder, kind, updates=8, batch=4)
    summary = json.loads((folder / "summary.json").read_text())
    interval = [win_rate - 0.05, win_rate + 0.05]
    found = {
        "win_rate": win_rate,
        "win_rate_interval": interval,
        "prompts": 160,
        "faithfulness_before": 0.9,
        "faithfulness_after": 0.8,
    }
    (folder / "summary.json").write_text(json.dumps(summary | {"status": "finished", "evaluation": found}))


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    for seed, (dpo, sft) in enumerate([(0.8, 0.6), (0.7, 0.65), (0.75, 0.6)]):
        cell(out, "dpo", seed, dpo)
        cell(out, "sft", seed, sft)
    cell(out, "dde", 0, 0.9, kind="dde")
    (study.folder_of(out, "dde", 1) / "samples").mkdir(parents=True)  # begun, not finished
    return out


def test_a_row_stands_on_its_finished_seeds(out):
    lines = {line["method"]: line for line in study.table_of(study.results_of(out))}
    assert list(lines) == list(study.ROWS)
    assert lines["dpo"]["seeds"] == 3 and lines["dpo"]["win rate"] == pytest.approx(0.75)
    assert lines["dpo"]["lowest bound of a seed"] == pytest.approx(0.65) and lines["dpo"]["over seeds"] == "± 0.050"
    low, high = map(float, lines["dpo"]["95 % interval"].split(" to "))
    assert 0.67 < low < 0.69 and 0.80 < high < 0.82  # Wilson, 160 prompts
    assert lines["dde"]["seeds"] == 1 and lines["dde"]["over seeds"] is None
    assert lines["discounted"] == {"method": "discounted", "seeds": "not yet run"}


def test_a_claim_holds_only_beyond_two_standard_errors(out):
    results = study.results_of(out)
    found = study.check(study.Claim("", ["dpo"], ["sft"]), results)
    assert found["difference"] == "+0.133" and found["standard error"] == "0.044" and found["larger in"] == "3 of 3"
    assert found["here"] == "holds"
    assert study.check(study.Claim("", ["sft"], ["dpo"]), results)["here"] == "does not hold"
    assert study.check(study.Claim("", ["dpo"], ["dpo"]), results)["here"] == "undecided"
    one = study.check(study.Claim("", ["dde"], ["dpo"]), results)
    assert one["seeds"] == 1 and one["difference"] == "+0.100" and "here" not in one
    assert study.check(study.Claim("", ["discounted"], ["dpo"]), results)["seeds"] == "not yet run"


def test_every_claim_and_flag_names_something_that_exists():
    from dpo.cli import parse

    assert {row for claim in study.CLAIMS for row in claim.better + claim.worse} <= set(study.ROWS)
    for flags in study.ROWS.values():
        parse(["--preset", "tiny", *flags])


def test_report_without_running_anything(out, tmp_path, capsys):
    page = tmp_path / "docs" / "evidence.md"
    assert study.main(["--out", str(out), "--seeds", "0", "--report", str(page)]) == 0
    text = page.read_text()
    assert "| dpo | 3 | 0.75 |" in text and "| discounted | not yet run |" in text and "(evidence.png)" in text
    assert "| 90 to 100 % |" in text and "`dde`: |C| falls with t" in text
    assert page.with_suffix(".png").stat().st_size > 10_000
    assert "| dpo | 3 |" in capsys.readouterr().out


def test_soft_labels_are_the_taste_s_probabilities(tmp_path):
    import pyarrow.parquet as pq

    from dpo import tiny

    hard = pq.read_table(tiny.train_pairs_path(), columns=["label_0"])["label_0"].to_numpy()
    table = pq.read_table(study.soft_pairs(tmp_path / "soft.parquet"), columns=["label_0", "label_1"])
    first, second = table["label_0"].to_numpy(), table["label_1"].to_numpy()
    assert abs(first + second - 1).max() < 1e-6 and ((first > 0) & (first < 1)).mean() > 0.9
    clear = hard != 0.5
    assert 0.75 < ((first > 0.5) == (hard > 0.5))[clear].mean() < 0.99  # the labels were drawn, not decided
