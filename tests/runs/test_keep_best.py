"""With --keep-best the weights of the best held-out accuracy are what is saved, drawn and reported, also over a resume."""

import json
import shutil

import numpy
import pytest
import torch
from safetensors.torch import load_file

from dpo.pages.folder import ADAPTER_FILE, SUMMARY_FILE, read_run
from dpo.pages.kept import grids
from dpo.pages.verdict import held_out, verdict
from dpo.settings.flags import parse
from dpo.training import build, checkpoint, choice, results, samples
from tests.help.commands import check_refused, command
from tests.help.processes import codes, commands
from tests.help.running import advance

CHOOSING = [0.5, 0.75, 0.75, 0.25, 0.5, 0.625]  # accuracy of the half that chooses, by update
REPORTED = [1.0, 0.5, 1.0, 1.0, 1.0, 1.0]
EDGE = [
    0.0,
    0.0,
    0.5,
    0.0,
    0.0,
    0.0,
]  # is added to the differences: the third is as accurate as the second, and less clear


@pytest.fixture
def scripted(monkeypatch):
    """Held-out differences as the lists above have them, whatever the weights are."""

    def differences(step, held):
        if scripted.run.best is None:
            return torch.zeros(1, 16)
        half = scripted.run.best.choosing
        at = scripted.run.done - 1
        found = torch.empty(len(half))
        for side, share in ((half, CHOOSING[at]), (~half, REPORTED[at])):
            count = int(side.sum())
            found[side] = torch.where(torch.arange(count) < round(share * count), -1.0 + EDGE[at], 1.0)
        return found[None]

    measure = choice.measure

    def noted(run, pairs):
        scripted.run = run
        return measure(run, pairs)

    monkeypatch.setattr(choice, "measure", noted)
    monkeypatch.setattr(choice.validation, "differences", differences)


def kept(folder):
    return read_run(folder).summary["kept"]


def names(folder):
    return [path.name for path in checkpoint.listing(folder / "checkpoints")]


def same(one, other):
    """Whether two files hold the same tensors."""
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def trained(world, tmp_path, capsys, scripted):
    flags = ["--model", world("sd15"), "--data", world("pairs"), "--workers", "0", "--lora", "--learning-rate", "3e-3"]
    flags += ["--batch-size", "2", "--ema", "0.9", "--validate-every", "1", "--validation-draws", "1"]
    flags += ["--max-pairs", "12", "--validation-data", world("pairs"), "--validation-split", "train"]
    flags += ["--validation-pairs", "16", "--checkpoint-every", "0", "--checkpoints-limit", "1"]

    def train(name, *more):
        said = command(capsys, *flags, "--steps", "6", "--output", tmp_path / name, *more)
        train.said = said
        return tmp_path / name

    train.flags = flags
    return train


@pytest.mark.long
def test_the_best_weights_are_saved_drawn_and_reported(trained, tmp_path):
    """Update 2 of 6 is the best: what the run leaves is what a run of two updates leaves."""
    drawn = ["--sample-prompts", "a fox", "--sample-seeds", "3", "--sample-steps", "2", "--sample-every", "4"]
    straight = trained("straight", "--keep-best", *drawn)
    found = kept(straight)
    assert (found["step"], found["of"], found["early"]) == (2, 6, False)
    assert (found["choosing_accuracy"], found["heldout_accuracy"], found["heldout_pairs"]) == (0.75, 0.5, 8)
    assert names(straight) == ["step-00000002", "step-00000006"], "the limit of one leaves the best alone"
    checkpoints = straight / "checkpoints"
    assert not same(*(checkpoints / name / "ema.safetensors" for name in names(straight)))

    config, _ = parse(
        [*trained.flags, "--steps", "2", "--validate-every", "0", *drawn, "--output", str(tmp_path / "short")]
    )
    short = build.build(config, [])
    samples.before(short)
    advance(short, 2)  # its last weights are those
    results.write(short)
    drawn_now = samples.write(short)
    assert same(straight / ADAPTER_FILE, short.output / ADAPTER_FILE)
    assert drawn_now.read_bytes() == (straight / "samples" / drawn_now.name).read_bytes()
    run = read_run(straight)
    shown = straight.resolve() / "samples" / "step-00000002.png"
    assert any(line.endswith(f"look at it: {straight.resolve() / 'report.html'}, {shown}") for line in trained.said.log)
    assert [path.stem for path in grids(run)] == ["step-00000004", "step-00000002"], "that of the result is shown"
    assert held_out(run).share == 0.5, "of the half that had no say"
    said = "weights of update 2 of 6: the best by one half of the held-out pairs, 75% of 8."
    assert said in " ".join(verdict(run).sentences) and "after 2 updates" in (straight / "report.html").read_text(
        "utf-8"
    )
    card = (straight / "README.md").read_text("utf-8")
    assert "samples/step-00000002.png" in card and "| update that is kept | 2 |" in card
    assert "| the same of the half that chose the update | 0.750 (8 pairs) |" in card
    rows = [json.loads(row) for row in (straight / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert [row["choosing_accuracy"] for row in rows if row.get("event") == "validation"] == CHOOSING


@pytest.mark.slow
def test_a_run_that_ended_early_goes_on_as_if_it_had_not(trained, tmp_path):
    straight = trained("straight", "--keep-best", "--no-samples")
    early = trained("early", "--keep-best", "--patience", "2", "--no-samples", "--log-every", "3")
    run = read_run(early)
    assert (kept(early)["of"], kept(early)["early"], run.status) == (4, True, "finished")
    assert run.done == run.wanted == 4 and same(early / ADAPTER_FILE, straight / ADAPTER_FILE)

    place = early / "checkpoints" / "step-00000002"
    place.rename(early / "aside")
    trained("early", "--resume", "latest", "--keep-best", "--no-samples")
    check_refused(trained.said, ["the best weights so far, of update 2, are not in", "--no-keep-best"])
    shutil.move(early / "aside", place)
    on = trained("early", "--keep-best", "--resume", "latest", "--no-samples")
    assert kept(on) == kept(straight) and names(on) == names(straight)
    assert same(on / ADAPTER_FILE, straight / ADAPTER_FILE)
    for group in ("policy", "ema", "optimizer"):
        file = f"checkpoints/step-00000006/{group}.safetensors"
        assert same(on / file, straight / file)


@pytest.mark.slow
def test_the_best_comes_along_where_a_run_goes_on_elsewhere(trained):
    early = trained("early", "--keep-best", "--patience", "2", "--no-samples")
    last = early / "checkpoints" / "step-00000004"
    again = trained("early", "--keep-best", "--patience", "2", "--no-samples", "--resume", "latest")
    assert trained.said.warnings("update 4 of 6 was made before: nothing is trained; raise --patience")
    assert kept(again)["early"] and names(again) == ["step-00000002", "step-00000004"]
    (early / SUMMARY_FILE).unlink()  # as a kill between the last update and the report leaves it
    again = trained("early", "--keep-best", "--patience", "2", "--no-samples", "--resume", "latest")
    assert kept(again)["early"] and kept(again)["of"] == 4
    elsewhere = trained("elsewhere", "--keep-best", "--no-samples", "--resume", last)
    assert same(elsewhere / ADAPTER_FILE, early / ADAPTER_FILE) and kept(elsewhere)["step"] == 2
    assert names(elsewhere) == ["step-00000002", "step-00000006"]
    assert held_out(read_run(elsewhere)).share == REPORTED[1], "though its metrics.jsonl begins after that update"
    plain = trained("plain", "--no-keep-best", "--no-samples", "--resume", last)
    assert "kept" not in read_run(plain).summary and not same(plain / ADAPTER_FILE, early / ADAPTER_FILE)
    trained("plain", "--keep-best", "--no-samples", "--resume", "latest")
    assert trained.said.warnings("no held-out accuracy to choose by: the last weights are the result")


CUT = ["--sharding", "on", "--ema", "0.5", "--learning-rate", "1e-3"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trained_as", "file"),
    [
        (["--lora", "--learning-rate", "3e-3"], ADAPTER_FILE),
        (CUT, "unet/diffusion_pytorch_model.safetensors"),
    ],
    ids=["lora", "shards"],
)
def test_two_processes_choose_as_one(world, tmp_path, capsys, trained_as, file):
    """No script here: accuracies of the weights as they are, in float64, so that both runs measure the same."""
    flags = ["--model", world("sd15"), "--data", world("pairs"), "--workers", "0", *trained_as]
    flags += ["--precision", "fp64", "--batch-size", "2", "--effective-batch", "4", "--steps", "8", "--no-samples"]
    flags += ["--validation-data", world("pairs"), "--validation-split", "train", "--validation-pairs", "24"]
    flags += ["--validate-every", "1", "--validation-draws", "2", "--max-pairs", "16", "--keep-best", "--patience", "3"]
    said = command(capsys, *flags, "--output", tmp_path / "one")
    assert said.code == 0, said
    assert codes(commands(2, [*flags, "--output", str(tmp_path / "two")], tmp_path)) == [0, 0]
    alone, both = kept(tmp_path / "one"), kept(tmp_path / "two")
    assert alone == {**both, **{name: pytest.approx(both[name]) for name in both if name.endswith("difference")}}
    one, two = (load_file(tmp_path / name / file) for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], rtol=1e-5, atol=1e-7) for name in one)


BEST_OF_FOUR = [0.25, 1.0, 0.5, 0.5]


@pytest.mark.slow
@pytest.mark.parametrize("starts", [1, 2])
def test_the_best_of_shards_is_the_result(world, tmp_path, monkeypatch, starts):
    """Update 2 of 4 by a script; the result are its averaged weights, whole, and a resume that trains nothing writes them again."""

    def differences(step, held):
        share = BEST_OF_FOUR[min(differences.calls, 3)]
        differences.calls += 1
        return torch.where(torch.arange(len(held.keys)) < round(share * len(held.keys)), -1.0, 1.0)[None]

    differences.calls = 0
    monkeypatch.setattr(choice.validation, "differences", differences)
    monkeypatch.setattr(choice, "choosing_half", lambda keys, captions, by: numpy.arange(len(keys)) % 2 == 0)
    flags = [
        "--model",
        world("sd15"),
        "--data",
        world("pairs"),
        "--workers",
        "0",
        *CUT,
        "--precision",
        "fp64",
        "--steps",
        "4",
    ]
    flags += ["--batch-size", "1", "--validation-data", world("pairs"), "--validation-split", "train", "--no-samples"]
    flags += ["--validate-every", "1", "--validation-draws", "1", "--validation-pairs", "16", "--keep-best"]
    flags += ["--checkpoint-every", "0", "--checkpoints-limit", "1", "--output", str(tmp_path / "cut")]
    cut = tmp_path / "cut"
    for number in range(starts):
        more = ["--resume", "latest"] if number else []
        assert codes(commands(2, [*flags, *more], tmp_path)) == [0, 0], (tmp_path / "said-0").read_text()
        assert (kept(cut)["step"], kept(cut)["of"]) == (2, 4) and names(cut) == ["step-00000002", "step-00000004"]
        result = load_file(cut / "unet" / "diffusion_pytorch_model.safetensors")
        best, last = (load_file(cut / "checkpoints" / name / "ema.safetensors") for name in names(cut))
        assert result.keys() == best.keys()
        far = [max((value - of[name]).abs().max().item() for name, value in result.items()) for of in (best, last)]
        assert far[0] < 1e-6 < 1e-4 < far[1], far  # rounded to fp32


@pytest.mark.slow
def test_an_accuracy_that_a_stop_cut_short_is_measured_by_the_next_start(trained, monkeypatch):
    """The checkpoint of an update whose held-out accuracy was not finished says so."""
    straight = trained("straight", "--keep-best", "--no-samples")
    differences = choice.validation.differences

    def stopped(step, held):
        if len(read_run(straight.parent / "cut").validations) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return differences(step, held)

    monkeypatch.setattr(choice.validation, "differences", stopped)
    cut = trained("cut", "--keep-best", "--no-samples")
    assert trained.said.code == 2 and [found["step"] for found in read_run(cut).validations] == [1, 2]
    assert names(cut)[-1] == "step-00000003", "the update itself is kept"
    monkeypatch.setattr(choice.validation, "differences", differences)
    trained("cut", "--resume", "latest", "--keep-best", "--no-samples")
    assert [found["step"] for found in read_run(cut).validations] == [1, 2, 3, 4, 5, 6]
    assert kept(cut) == kept(straight)
