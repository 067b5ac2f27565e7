"""The benchmark of what a step is spared puts work back that changes no bit, counts it, and leaves nothing behind."""

import json

import pytest
import torch

from benchmarks import spared
from benchmarks.prepare import SIZES, make_model, make_pairs, make_run


@pytest.fixture
def run(tmp_path):
    model, pairs = make_model(tmp_path / "model", SIZES["tiny"]), make_pairs(tmp_path / "pairs", 32)
    return make_run(model, pairs, tmp_path / "run", 2, "--lora", "--precision", "bf16", "--keep-encoded", "off")


@pytest.mark.long
def test_what_is_put_back_changes_no_bit_and_is_taken_out_again(run):
    work, counted, found = spared.micro_step(run), {}, {}
    parameters = run.updater.parameters
    for name, block in {"now": spared.nullcontext, **spared.put_back(run), "then": spared.nullcontext}.items():
        run.updater.drop()
        with block(), spared.Operations() as seen:
            loss = work()
        counted[name], found[name] = seen.calls, [loss, *(p.grad.clone() for p in parameters)]
    assert all(torch.equal(a, b) for each in found.values() for a, b in zip(found["now"], each, strict=True))
    assert counted["now"] == counted["then"]
    casts, products, divisions = (
        {way: calls[operation] for way, calls in counted.items()} for operation in spared.COUNTED.values()
    )
    assert casts["all"] == casts["adapters"] >= casts["now"] + 64 and products["adapters"] >= products["now"] + 64
    assert divisions["adapters"] == divisions["now"] < divisions["all"]


@pytest.mark.slow
def test_the_table_has_a_row_for_each(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    with pytest.raises(SystemExit):
        spared.main(["--rounds", "1", "--out", str(tmp_path)])
    assert "--rounds 1: at least 2" in capsys.readouterr().err
    words = ["--size", "tiny", "--precision", "fp32", "--rounds", "2", "--out", str(tmp_path)]
    assert spared.main(words) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["spared"]
    assert [(row["trained"], row["put back"]) for row in rows] == [
        ("full", "all"),
        ("lora", "all"),
        ("lora", "adapters"),
    ]
    assert all(row["operations before"] > row["operations now"] and row["before / now"] > 0 for row in rows)
    assert "| tiny | fp32 | lora | adapters |" in capsys.readouterr().out and (tmp_path / "spared.md").is_file()
