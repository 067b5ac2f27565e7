"""dpo.sweep: the grid, its table and plot, what is refused before the first run, going on after an interruption."""

import csv
import json
import os

import pytest

from dpo import prepare, sweep
from dpo.common import locks
from dpo.common.errors import OutOfMemory, UserError
from dpo.data.store.files import INDEX, write_sealed
from dpo.pages.folder import read_run
from dpo.pages.sweep import name_of
from dpo.planning import full, recompute
from dpo.settings.config import change, flat_settings, from_mapping, to_toml
from dpo.settings.flags import load_config
from dpo.training import loop
from tests.help.fake_run import write_run

QUICK = [
    "--steps",
    "2",
    "--batch-size",
    "4",
    "--workers",
    "0",
    "--sample-steps",
    "1",
    "--sample-seeds",
    "0",
    "--sample-prompts",
    "a fox",
]


def test_flags_with_several_values_are_axes():
    out, grid, rest = sweep.read(
        [
            "--beta",
            "1000,2000",
            "--method=dpo,dde",
            "--out",
            "x",
            "--model",
            "m",
            "--lr",
            "1e-5,2e-5",
            "--lora",
            "--checkpointing",
            "a,b",
            "--target-modules",
            "to_q,to_k",
        ]
    )
    assert str(out) == "x" and list(grid) == ["beta", "method", "learning_rate"]
    assert rest == ["--model", "m", "--lora", "--checkpointing", "a,b", "--target-modules", "to_q,to_k"]
    names = [name_of(cell) for cell in sweep.cells(grid)]
    assert len(set(names)) == 8 and names[0] == "beta-1000_method-dpo_learning_rate-1e-5"


@pytest.mark.parametrize(
    ("argv", "grid", "rest"),
    [
        (["--lora", "--beta=1,2", "--out=o"], {"beta": ["1", "2"]}, ["--lora"]),  # a switch takes no flag for its value
        (["--deterministic", "--out", "o", "--lr", "1,2"], {"learning_rate": ["1", "2"]}, ["--deterministic"]),
        (["--lora", "true,false", "--out", "o"], {"lora": ["true", "false"]}, []),
        (["--logit-mean", "-1e-3,0", "--lora", "--out", "o"], {"logit_mean": ["-1e-3", "0"]}, ["--lora"]),
    ],
)
def test_a_flag_is_no_value_of_the_one_before(argv, grid, rest):
    out, *others = sweep.read(argv)
    assert (str(out), others) == ("o", [grid, rest])


def test_an_axis_may_be_a_switch_or_below_zero(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(loop, "train", lambda config, *others: begun.append(config) or 0)
    command = ["--lora", "true,false", "--logit-mean", "-1e-3,0", "--steps", "2"]
    assert sweep.main(["--out", str(tmp_path / "sweep"), *command]) == 0
    told = [(config.lora.lora, config.method.logit_mean) for config in begun]
    assert told == [(True, -1e-3), (True, 0.0), (False, -1e-3), (False, 0.0)]


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--beta", "1,2"], "--out"),
        (["--out", "--beta=1,2"], "--out FOLDER"),
        (["--out", "x", "--beta", "1"], "nothing to compare"),
        (["--out", "x", "--data", "d", "--beta", "1"], "nothing to compare"),
        (["--out", "x", "--bta", "1,2", "--model", "m", "--data", "d"], "unknown flag --bta: did you mean --beta?"),
        (["--out", "x", "--beta", "1,,2"], "a value between the commas is empty"),
        (["--out", "x", "--seed", "0,0"], "--seed 0,0: the values between the commas are the same"),
        (["--out", "x", "--beta", "1e3,1000"], "--beta 1e3,1000: the values between the commas are the same"),
        (["--out", "x", "--beta", "1,-2", "--model", "m", "--data", "d"], "beta = -2"),
    ],
)
def test_mistakes_are_found_before_the_first_run(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert sweep.main(argv) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def flags(world, tmp_path_factory):
    store = tmp_path_factory.mktemp("sweep") / "store"
    base = ["--model", world("sd15"), "--batch-size", "4", "--workers", "0"]
    assert prepare.main(["--store", str(store), "--data", world("pairs"), "--reference", "--draws", "1", *base]) == 0
    return [
        "--model",
        world("sd15"),
        "--data",
        str(store),
        "--reference",
        "recorded",
        "--validation-fraction",
        "0.2",
        "--validation-draws",
        "1",
        *QUICK,
    ]


@pytest.mark.long
def test_a_grid_is_run_compared_and_gone_on_with(flags, tmp_path, monkeypatch, pageless, capsys):
    out = tmp_path / "sweep"
    command = ["--out", str(out), "--method", "dpo,dde", *flags]
    real, started = loop.train, []

    def interrupted(config, notes, *own):
        started.append(config.method.method)
        return real(config, notes, *own) if len(started) == 1 else 130

    monkeypatch.setattr(loop, "train", interrupted)
    assert sweep.main(command) == 130
    assert "starting anew" not in capsys.readouterr().err  # nobody asked to go on with anything
    assert [row["status"] for row in csv.DictReader((out / "sweep.csv").open())] == ["finished", "not started"]
    monkeypatch.setattr(
        loop, "train", lambda config, notes, *own: started.append(config.method.method) or real(config, notes, *own)
    )
    assert sweep.main(command) == 0
    assert started == ["dpo", "dde", "dde"]  # the finished run is not repeated
    rows = list(csv.DictReader((out / "sweep.csv").open()))
    assert [row["method"] for row in rows] == ["dpo", "dde"] and all(
        row["status"] == "finished" and row["updates"] == "2" for row in rows
    )
    run = read_run(out / "method-dde")
    assert float(rows[1]["loss"]) == pytest.approx(run.late("loss"))
    assert float(rows[1]["held-out accuracy"]) == run.validations[-1]["heldout_accuracy"]
    assert (out / "sweep.png").stat().st_size > 10_000 and (out / "sweep.md").read_text().count("\n") == 4
    assert (
        sweep.main(["--out", str(out), "--method", "dpo,dde", *flags, "--seed", "1"]) == 2
    )  # other flags, same folder


def test_a_failed_run_is_noted_and_the_rest_goes_on(flags, tmp_path, monkeypatch):
    def train(config, *others):
        if config.method.beta == 1:
            raise UserError("it diverged")
        return 0

    monkeypatch.setattr(loop, "train", train)
    out = tmp_path / "sweep"
    assert sweep.main(["--out", str(out), "--beta", "1,2", *flags]) == 1
    assert [row["status"] for row in csv.DictReader((out / "sweep.csv").open())] == ["failed", "not started"]
    assert (out / "beta-1" / "failed.txt").read_text() == "it diverged\n"


def test_a_second_sweep_in_the_folder_trains_nothing(flags, tmp_path, monkeypatch, capsys):
    started = []
    monkeypatch.setattr(loop, "train", lambda config, *others: started.append(config) or 0)
    monkeypatch.setattr(locks, "WAIT", 0.1)
    command = ["--out", str(tmp_path), "--beta", "1,2", *flags]
    with locks.held(tmp_path, "--out"):
        assert sweep.main(command) == 2
    assert f"--out {tmp_path} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert not started and not (tmp_path / "flags.txt").exists()
    assert sweep.main(command) == 0 and len(started) == 2


def test_a_run_of_a_sweep_begins_and_ends_as_the_train_command_has_it(flags, tmp_path, monkeypatch):
    """What --checkpointing leaves open is decided, and what would fit is said."""

    def full_memory(config, notes, *others):
        assert (config.runtime.checkpointing, notes[-1]) == ("mid_block", "decided")
        raise OutOfMemory("out of GPU memory", at_first=config.method.beta == 1)

    monkeypatch.setattr(loop, "train", full_memory)
    decided = lambda config, *others: (change(config, checkpointing="mid_block"), "decided")  # noqa: E731
    monkeypatch.setattr(recompute, "decided", decided)
    monkeypatch.setattr(full, "instead", lambda *given: "; by the plan this would fit: X")
    out = tmp_path / "sweep"
    assert sweep.main(["--out", str(out), "--beta", "1,2", *flags, "--checkpointing", "auto"]) == 1
    noted = [(out / f"beta-{beta}" / "failed.txt").read_text() for beta in (1, 2)]
    assert noted == ["out of GPU memory; by the plan this would fit: X\n", "out of GPU memory\n"]


@pytest.mark.parametrize("name", ["flags.txt", "settings.json", "sweep.csv", "sweep.md", "sweep.png"])
def test_no_table_of_somebody_elses_is_written_over(tmp_path, capsys, monkeypatch, name):
    monkeypatch.setattr(loop, "train", lambda config, notes, step: 0)
    out = tmp_path / "sweep"
    out.mkdir()
    (out / name).write_text("mine")
    assert sweep.main(["--out", str(out), "--loss", "sigmoid,ipo", "--steps", "2"]) == 2
    said = capsys.readouterr().err
    assert (name in said and "name another --out" in said) or "a sweep with other flags (mine)" in said
    assert [path.name for path in out.iterdir()] == [name] and (out / name).read_text() == "mine"


def test_no_note_is_written_among_somebody_elses_files(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "train", lambda config, notes, step: pytest.fail("trained"))
    mine = tmp_path / "sweep" / "loss-ipo"
    mine.mkdir(parents=True)
    for name in ("model_index.json", "failed.txt"):
        (mine / name).write_text("mine")
    with monkeypatch.context() as patch:
        patch.setattr(sweep, "cells", lambda grid: [{"loss": "ipo"}])
        assert sweep.main(["--out", str(tmp_path / "sweep"), "--loss", "sigmoid,ipo", "--steps", "2"]) == 1
    assert "loss-ipo is no run and has model_index.json" in capsys.readouterr().err
    assert {path.name: path.read_text() for path in mine.iterdir()} == {
        "model_index.json": "mine",
        "failed.txt": "mine",
    }


def test_a_note_replaces_a_link_not_what_it_points_to(tmp_path, monkeypatch):
    def train(config, *others):
        note = tmp_path / "sweep" / f"loss-{config.method.loss}" / "failed.txt"
        note.parent.mkdir(parents=True)
        note.symlink_to(tmp_path / "key")
        raise UserError("it diverged")

    (tmp_path / "key").write_text("mine")
    monkeypatch.setattr(loop, "train", train)
    assert sweep.main(["--out", str(tmp_path / "sweep"), "--loss", "sigmoid,ipo", "--steps", "2"]) == 1
    assert (tmp_path / "key").read_text() == "mine"
    assert (tmp_path / "sweep" / "loss-ipo" / "failed.txt").read_text() == "it diverged\n"


IDENTITY = {
    "reference": "hash",
    "prediction_type": "epsilon",
    "schedule": "hash",
    "flip": False,
    "caption_dropout": 0.0,
}


def records(folder, *made):
    """A folder that looks like a prepared store with a record for each (seed, precision)."""
    (folder / "reference").mkdir(parents=True)
    (folder / INDEX).touch()
    for seed, precision in made:
        about = {"identity": IDENTITY | {"seed": seed, "precision": precision}, "timesteps": [0], "pieces": []}
        (folder / "reference" / f"{seed}-{precision}").mkdir()
        write_sealed(folder / "reference" / f"{seed}-{precision}" / "record.json", about)
    return folder


@pytest.mark.parametrize(
    ("made", "flags", "said"),
    [
        ([(0, "fp32")], ["--seed", "0,1,2"], "runs with --seed 1, --seed 2 (it was recorded with --seed 0, the run has 1)"),
        ([(0, "fp32")], ["--precision", "auto,bf16"], "--precision bf16 (it was recorded with --precision fp32, the run"),
        ([(0, "bf16"), (1, "fp32")], ["--seed", "0,1"], "--seed 0 (it was recorded with --"),  # not from two records
        ([(3, "fp32")], ["--beta", "1,2"], "runs with --seed 0 (it was recorded with --seed 3"),
        ([], ["--beta", "1,2"], "runs with --seed 0 (there is none yet)"),
        ([(0, "fp32"), (1, "fp32")], ["--seed", "0,1", "--unet-init", "other"], ""),  # only the weights can tell
        ([(0, "fp32")], ["--seed", "0,1", "--reference", "auto"], ""),
    ],
)  # fmt: skip
def test_records_that_are_missing_are_told_before_the_first_run(tmp_path, monkeypatch, capsys, made, flags, said):
    begun = []
    monkeypatch.setattr(loop, "train", lambda config, *others: begun.append(config) or 0)
    store = str(records(tmp_path / "store", *made))
    command = [
        "--out",
        str(tmp_path / "out"),
        "--model",
        "m",
        "--data",
        store,
        "--reference",
        "recorded",
        "--device",
        "cpu",
    ]
    assert sweep.main([*command, *flags]) == (2 if said else 0)
    told = capsys.readouterr().err
    if said:
        assert said in told and told.count("\n") == 1
        assert not begun and not (tmp_path / "out").exists()
    else:
        assert len(begun) == 2


def test_the_command_for_a_missing_record_has_what_it_depends_on(tmp_path, monkeypatch, capsys):
    store = str(records(tmp_path / "my store", (0, "fp32")))
    flags = [
        "--model",
        "m",
        "--unet-init",
        "u",
        "--flip",
        "--caption-dropout",
        "0.1",
        "--lr",
        "1e-5",
        "--device",
        "cpu",
    ]
    command = ["--out", str(tmp_path / "out"), "--data", store, "--reference", "recorded", *flags]
    assert sweep.main([*command, "--beta", "1,2", "--seed", "1"]) == 2
    assert capsys.readouterr().err.endswith(
        f"make it before, with python -m dpo.prepare --store '{store}' --reference --model m --unet-init u --flip "
        "--caption-dropout 0.1 --seed 1\n"
    )
    assert sweep.main([*command[:2], "--data", str(tmp_path), *command[4:], "--beta", "1,2"]) == 2
    assert "--reference recorded needs a prepared store" in capsys.readouterr().err


def test_a_finished_run_needs_no_record_any_more(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(loop, "train", lambda config, *others: begun.append(config.runtime.seed) or 0)
    place = write_run(tmp_path / "out" / "seed-0", updates=6)
    store = str(records(tmp_path / "store", (1, "fp32")))
    command = ["--model", "m", "--data", store, "--reference", "recorded", "--device", "cpu", "--steps", "6"]
    assert sweep.main(["--out", str(place.parent), "--seed", "0,1", *command]) == 0
    assert begun == [1]


def failing(monkeypatch, *betas):
    """Makes runs of these betas, and of all where none is named, end by a user's mistake."""

    def train(config, *others):
        if not betas or config.method.beta in betas:
            raise UserError("no such file")
        return 0

    monkeypatch.setattr(loop, "train", train)


def test_a_sweep_that_trained_nothing_gives_its_folder_to_other_flags(tmp_path, monkeypatch, capsys):
    out = tmp_path / "sweep"
    failing(monkeypatch)
    assert sweep.main(["--out", str(out), "--beta", "1,2", "--steps", "2"]) == 1
    (out / "thoughts.txt").write_text("mine")
    (out / "beta-2" / "thoughts.txt").write_text("mine")
    (out / "beta-2" / "metrics.jsonl").write_text('{"event": "started"}\n{"step": 1, "pairs": 0}\n')  # none was usable
    failing(monkeypatch, 3)
    assert sweep.main(["--out", str(out), "--beta", "3,4", "--steps", "3"]) == 1
    assert "other flags, which trained nothing and gives way: --steps 2" in capsys.readouterr().err
    assert (out / "flags.txt").read_text() == "--steps 3\n"
    files = sorted(
        path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file() and path.name != ".lock"
    )
    assert files[:3] == ["beta-2/metrics.jsonl", "beta-2/thoughts.txt", "beta-3/failed.txt"]
    assert files[3:] == ["flags.txt", "settings.json", "sweep.csv", "sweep.md", "thoughts.txt"]
    assert not (out / "beta-1").exists()


@pytest.mark.parametrize("left", ["checkpoint", "summary", "updates", "run of an earlier grid", "no table"])
def test_a_sweep_that_trained_something_keeps_its_folder(tmp_path, monkeypatch, capsys, left):
    out = tmp_path / "sweep"
    failing(monkeypatch)
    assert sweep.main(["--out", str(out), "--beta", "1,2", "--steps", "2"]) == 1
    if left == "checkpoint":
        (out / "beta-1" / "checkpoints" / "step-00000001").mkdir(parents=True)
        (out / "beta-1" / "checkpoints" / "step-00000001" / "state.json").write_text('{"format": 1}')
    elif left == "summary":
        (out / "beta-1" / "summary.json").write_text("{}")
    elif left == "updates":
        (out / "beta-1" / "metrics.jsonl").write_text('{"event": "started", "step": 0}\n{"step": 1, "loss": 0.5}\n')
    elif left == "no table":
        (out / "sweep.csv").unlink()
    else:
        write_run(out / "beta-0", updates=6)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    capsys.readouterr()
    assert sweep.main(["--out", str(out), "--beta", "1,2", "--steps", "3"]) == 2
    told = capsys.readouterr().err
    name = {"run of an earlier grid": ", begun in beta-0", "no table": ""}.get(left, ", begun in beta-1")
    assert (
        f"a sweep with other flags (--steps 2){name}: give the same ones to go on with it, or name another --out"
        in told
    )
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_no_note_of_somebody_elses_is_deleted(tmp_path, monkeypatch):
    """A table names folders outside, or one with a model of somebody's."""
    out, mine = tmp_path / "sweep", tmp_path / "sweep" / "beta-1"
    failing(monkeypatch)
    assert sweep.main(["--out", str(out), "--beta", "1,2", "--steps", "2"]) == 1
    (mine / "model_index.json").write_text("{}")
    for folder in (tmp_path, out):
        (folder / "failed.txt").write_text("mine")
    table = (out / "sweep.csv").read_text()
    row = table.splitlines()[-1].removesuffix("beta-2")
    (out / "sweep.csv").write_text(f"{table}{row}..\n{row}\n{row}.\n{row}{mine.parent.parent}\n{row}../sweep\n1\n")
    assert sweep.main(["--out", str(out), "--beta", "3,4", "--steps", "3"]) == 1
    assert [(folder / "failed.txt").is_file() for folder in (tmp_path, out, mine)] == [True, True, True]
    assert not (out / "beta-2").exists()


def test_a_sweep_of_the_embedded_world_over_the_shapes(tmp_path, monkeypatch):
    """Without model and data; the axis `loss` keeps its column beside the figure of that name."""
    begun = []
    monkeypatch.setattr(loop, "train", lambda config, *others: begun.append(config) or 0)
    (tmp_path / "sweep" / "loss-ipo").mkdir(parents=True)  # of a run that was begun
    assert sweep.main(["--out", str(tmp_path / "sweep"), "--loss", "sigmoid,ipo", "--steps", "2"]) == 0
    assert [(c.method.loss, c.optim.steps, c.output.resume, c.output.overwrite) for c in begun] == [
        ("sigmoid", 2, None, False), ("ipo", 2, "latest", False),
    ]  # fmt: skip
    rows = list(csv.DictReader((tmp_path / "sweep" / "sweep.csv").open()))
    assert [(row["--loss"], row["loss"]) for row in rows] == [("sigmoid", ""), ("ipo", "")]


def test_overwrite_replaces_no_run(tmp_path, monkeypatch):
    begun = []
    monkeypatch.setattr(loop, "train", lambda config, *others: begun.append(config.output) or 0)
    out = tmp_path / "sweep"
    for name, file, text in (
        ("loss-sigmoid", "config.toml", '[method]\nmethod = "dpo"\n[output]\ncheckpoint_every = 500\n'),
        ("loss-ipo", "model_index.json", "somebody's"),
    ):
        (out / name).mkdir(parents=True)
        (out / name / file).write_text(text)
    assert sweep.main(["--out", str(out), "--overwrite", "--loss", "sigmoid,ipo,hinge", "--steps", "6"]) == 0
    assert [(one.resume, one.overwrite) for one in begun] == [("latest", False), (None, True), (None, True)]


def finished(folder):
    folder.mkdir()
    (folder / "summary.json").write_text('{"status": "finished", "steps": 6}')
    (folder / "metrics.jsonl").write_text('{"step": 6, "loss": 0.5}\n')


BASE = {"steps": 6, "lora": True, "lora_init": "it.safetensors", "batch_size": 4, "precision": "fp16"}


@pytest.mark.parametrize(
    ("now", "said"),
    [
        ({}, None),
        ({"threads": 2, "steps": 5}, None),  # free to change; more updates than are asked for are made
        ({"learning_rate": 2e-5}, "learning_rate 1e-05 -> 2e-05"),
        ({"batch_size": 8, "method": "sdpo"}, "batch_size 4 -> 8, effective_batch 4 -> 8, method dpo -> sdpo"),
        ({"accumulation": 2}, "accumulation 1 -> 2, effective_batch 4 -> 8"),
        ({"unet_init": "u"}, "unet_init None -> u"),
        ({"lora_init": "none"}, "lora_init it.safetensors -> None"),
    ],
)
def test_a_finished_run_has_the_settings_of_now_or_is_refused(tmp_path, monkeypatch, capsys, now, said):
    """Whatever the run decided: fp16 is fp32 on a CPU, the rank is that of --lora-init."""
    out, file, begun = tmp_path / "sweep", tmp_path / "base.toml", []

    def made(settings):
        file.write_text("".join(f"{name} = {json.dumps(value)}\n" for name, value in settings.items()))
        return sweep.main(["--out", str(out), "--config", str(file), "--beta", "1,2", "--device", "cpu"])

    monkeypatch.setattr(sweep, "_all", lambda *given: begun.append(given) or 0)
    assert made(BASE | {"learning_rate": 3e-5}) == made(BASE) == 0  # nothing is finished yet
    finished(out / "beta-1")
    assert made(BASE | now) == (2 if said else 0) and len(begun) == (2 if said else 3)
    told = capsys.readouterr().err
    if said:
        assert (
            f"dpo.sweep: {out / 'beta-1'} is finished, with other settings than this command has now ({said})" in told
        )
        assert told.count("\n") == 1 and made(BASE) == 0


def test_of_a_finished_run_what_no_version_noted_is_no_difference(tmp_path, monkeypatch):
    monkeypatch.setattr(sweep, "_all", lambda *given: 0)
    for name in ("beta-1", "beta-2"):
        finished(tmp_path / name)
    (tmp_path / "flags.txt").write_text("--steps 6 --lr 1e-5\n")
    (tmp_path / "settings.json").write_text('{"beta-1": {"learning_rate": 1e-5, "of_later": 1}}')
    assert sweep.main(["--out", str(tmp_path), "--beta", "1,2", "--steps", "6", "--lr", "1e-5"]) == 0


def test_a_value_spelt_twice_is_one_run():
    """In whatever spelling; a value that the setting does not take is found at once."""
    assert sweep.read(["--out", "o", "--beta", "1e3,2000,1000,2e3"])[1] == {"beta": ["1e3", "2000"]}
    with pytest.raises(UserError, match="beta = many"):
        sweep.read(["--out", "o", "--beta", "1000,many"])


def test_more_epochs_or_another_patience_make_a_finished_run_an_unfinished_one(tmp_path):
    place = write_run(tmp_path)
    asked = from_mapping(flat_settings(load_config(str(place / "config.toml"))))
    asked = change(asked, steps=None, epochs=2.0, keep_best=True, patience=3)
    (place / "config.toml").write_text(to_toml(asked), encoding="utf-8")
    assert sweep._finished(place, asked) and not sweep._finished(place, change(asked, epochs=3.0))
    run = read_run(place)
    (place / "summary.json").write_text(
        json.dumps(run.summary | {"steps": run.done, "kept": {"early": True}}), encoding="utf-8"
    )
    assert sweep._finished(place, asked) and not sweep._finished(place, change(asked, patience=4))
