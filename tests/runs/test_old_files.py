"""Files of earlier versions still work: a checkpoint resumes, a store opens, recorded reference errors serve and grow.

tests/golden/v0.1 says how its files were made. They are copied first: a test writes into them.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from dpo import prepare
from dpo.common.files import checksum
from dpo.data.store import recorded, store
from dpo.settings.flags import parse
from dpo.training.build import build
from tests.help.commands import command
from tests.help.running import advance, everything

OLD = Path(__file__).parents[1] / "golden" / "v0.1"
QUIET = [
    "--workers",
    "0",
    "--validate-every",
    "0",
    "--sample-steps",
    "1",
    "--sample-seeds",
    "0",
    "--sample-prompts",
    "red",
]
RESUMED = ["--output", "lora", "--resume", "latest", "--steps", "4"]
RECORDED = [
    "--model",
    "pipeline",
    "--data",
    "store",
    "--reference",
    "recorded",
    "--output",
    "recorded",
    "--lora",
    "--rank",
    "2",
]
RECORDED += [
    "--flip",
    "--precision",
    "fp32",
    "--learning-rate",
    "1e-3",
    "--batch-size",
    "4",
    "--steps",
    "4",
    "--beta",
    "200",
]
RECORDED += ["--device", "cpu", "--threads", "1", "--no-model-card", *QUIET]
RECORD = ["--store", "store", "--model", "pipeline", "--reference", "--flip", "--device", "cpu", "--precision", "fp32"]
RECORD += ["--batch-size", "4"]

# Another processor adds in another order. In fp32 that moves an error (about 1, a mean over 256 values) by a few 1e-6.
# A margin is a difference of errors times 100 to 200, so it moves by a few 1e-4; the loss moves no more than that. The
# tolerance of a gradient's norm is relative. Files that are read wrongly differ far more: another timestep or image
# changes an error by 1e-2.
NEAR = {
    "policy_win_error": {"rel": 1e-4},
    "reference_win_error": {"rel": 1e-4},
    "margin_mean": {"abs": 1e-3},
    "loss": {"abs": 1e-3},
    "grad_norm": {"rel": 1e-2},
}


@pytest.fixture
def old(tmp_path, monkeypatch):
    """A copy of the files, made the working folder, since the paths in them are relative."""
    folder = shutil.copytree(OLD, tmp_path / "old")
    monkeypatch.chdir(folder)
    return folder


def check_figures(folder: Path, run: str, updates: list[int]) -> None:
    """The figures of these updates are those of the version that made the files."""
    expected = json.loads((OLD / "expected.json").read_text(encoding="utf-8"))[run]
    lines = map(json.loads, (folder / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    rows = {row["step"]: row for row in lines if "loss" in row}
    assert sorted(rows) == [1, 2, 3, 4]
    for update in updates:
        for name, tolerance in NEAR.items():
            was = pytest.approx(expected[str(update)][name], **{"rel": 0, "abs": 1e-7, **tolerance})
            assert rows[update][name] == was, f"update {update}: {name}"


def test_every_tensor_of_an_old_checkpoint_is_put_back(old):
    run = build(*parse(RESUMED))
    assert (run.done, run.position, run.total) == (2, 8, 4)
    saved = {}
    for group in ("policy", "optimizer", "ema", "tables"):
        tensors = load_file(old / "lora" / "checkpoints" / "step-00000002" / f"{group}.safetensors")
        saved |= {f"{group}.{name}": value for name, value in tensors.items()}
    found = everything(run)
    assert saved.keys() == found.keys()
    assert [name for name in saved if not torch.equal(saved[name], found[name])] == []
    assert saved["tables.correction"].any() and any(
        value.any() for name, value in saved.items() if name.startswith("optimizer.")
    )


def test_old_averaged_weights_go_on_with_the_decay_of_their_update(old):
    run = build(*parse(RESUMED))
    before = [average.clone() for average in run.updater.ema]
    advance(run, 1)
    rest = 1 - 3 / 12  # after two updates: below the 0.9 asked for
    for average, value, parameter in zip(run.updater.ema, before, run.updater.parameters, strict=True):
        torch.testing.assert_close(average, value.lerp(parameter.detach(), rest), rtol=1e-6, atol=1e-8)


@pytest.mark.long
def test_an_old_run_goes_on_as_it_would_have(old, capsys):
    said = command(capsys, *RESUMED)
    assert said.code == 0 and said.errors == []
    assert any("resumed" in line and "2 updates done, 8 pairs seen" in line for line in said.log)
    assert any("its correction table goes on as it began, one entry a timestep" in line for line in said.log)
    assert any("correction table: 1000 entries for 1000 timesteps" in line for line in said.log)
    check_figures(old, "lora", [3, 4])


@pytest.mark.long
def test_an_old_store_and_its_record_are_whole_and_serve(old, capsys):
    assert store.verify(old / "store") == [] and recorded.verify(old / "store") == []
    said = command(capsys, *RECORDED)
    assert said.code == 0 and said.errors == []
    check_figures(old, "recorded", [1, 2, 3, 4])


@pytest.mark.long
def test_more_draws_are_added_to_an_old_record(old):
    pieces = {path: checksum(path) for path in (old / "store" / "reference").rglob("*.safetensors")}
    assert prepare.main([*RECORD, "--draws", "3"]) == 0
    after = {path: checksum(path) for path in (old / "store" / "reference").rglob("*.safetensors")}
    assert len(after) > len(pieces) and pieces.items() <= after.items(), "what was recorded is kept, in the same record"
    assert recorded.verify(old / "store") == []
    assert build(*parse(RECORDED)).recorded.distinct == 3
