"""Trouble during a run: divergence, full memory or disk, dying workers, absent services, a second start."""

import errno
import json
import os
import shlex
import shutil
import signal
import sys
import types
from contextlib import ExitStack
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

import dpo.models.load
import dpo.train
from dpo import prepare
from dpo.common import locks
from dpo.training import checkpoint, loop, samples
from tests.help.commands import check_refused, command, tree
from tests.help.worlds import make_pickapic

STEP = "checkpoints/step-{:08d}"


def at_update(monkeypatch, number: int, trouble) -> None:
    """`trouble(run)` happens just before update `number` (counted from 1)."""
    step = dpo.train.train_step

    def troubled(run, batches):
        if run.done == number - 1:
            trouble(run)
        return step(run, batches)

    monkeypatch.setattr(dpo.train, "train_step", troubled)


def test_a_loss_that_is_not_finite_stops_after_the_last_good_state(start, tmp_path, capsys, monkeypatch, brief):
    words = [*start, "--steps", "3", "--checkpoint-every", "0"]
    with monkeypatch.context() as patch:
        at_update(patch, 2, lambda run: run.step.beta.fill_(float("nan")))
        said = command(capsys, *words)
    check_refused(said, ["update 2", "not finite", "timesteps: ", "--learning-rate", "--resume latest"])
    assert [path.name for path in (tmp_path / "out" / "checkpoints").iterdir()] == ["step-00000001"]
    event = json.loads((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()[-1])
    assert event["event"] == "failed" and event["step"] == 1
    assert command(capsys, *words, "--resume", "latest").code == 0
    assert command(capsys, *words, "--output", tmp_path / "straight").code == 0
    ends = [checkpoint.load(tmp_path / name / STEP.format(3)).tensors["policy"] for name in ("out", "straight")]
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())


def test_a_learning_rate_that_blows_up_is_told_with_its_timesteps(start, capsys, brief):
    said = command(capsys, *start, "--steps", "5", "--learning-rate", "1e30")
    check_refused(said, ["update 2", "not finite", "--learning-rate"])
    assert said.warnings("is high for full fine-tuning")


def test_out_of_gpu_memory_says_what_to_change(start, tmp_path, capsys, monkeypatch, brief):
    def full(run):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB\nmore lines")

    at_update(monkeypatch, 2, full)
    said = command(capsys, *start, "--steps", "3", "--checkpoint-every", "1")
    check_refused(
        said, ["out of GPU memory", "--batch-size", "--accumulation", "--checkpointing", "--lora", "--resume latest"]
    )
    assert (tmp_path / "out" / STEP.format(1)).is_dir()


def test_a_folder_of_other_things_is_not_written_into(start, tmp_path, capsys, brief):
    (tmp_path / "mine" / "unet" / "inner").mkdir(parents=True)
    (tmp_path / "mine" / "README.md").write_text("mine")
    said = command(capsys, *start, "--steps", "1", "--output", str(tmp_path / "mine"))
    check_refused(said, ["is no run", "README.md, unet", "--overwrite"])
    assert (tmp_path / "mine" / "README.md").read_text() == "mine"


@pytest.mark.parametrize("peer", ["hf-sd15", "sf"])
def test_another_trainers_results_are_not_replaced_by_its_command_line(world, tmp_path, capsys, brief, peer):
    """--compat takes over the folder that it names; `sf` resumes whatever is there."""
    out = tmp_path / "out"
    for name in (
        "pytorch_lora_weights.safetensors",
        "model_index.json",
        "unet/config.json",
        "scheduler/a",
        "curves.png",
    ):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("of another trainer")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    words = ["--pretrained_model_name_or_path", world("sd15"), "--dataset_name", world("pairs"), "--resolution", "32"]
    words += ["--output_dir", str(out), "--max_train_steps", "1", "--compat", peer]
    check_refused(command(capsys, *words), ["is no run", "pytorch_lora_weights.safetensors", "scheduler", "curves.png"])
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


@pytest.mark.long
def test_a_run_on_linked_folders_is_made_anew_and_goes_on(start, tmp_path, capsys, brief):
    """Checkpoints and weights on a larger disk: --overwrite empties them, and the links stay."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    out.mkdir()
    for name in ("checkpoints", "unet", "samples"):
        (disk / name).mkdir(parents=True)
        (out / name).symlink_to(disk / name)
    steps = [*start, "--checkpoint-every", "1", "--steps"]
    assert command(capsys, *steps, "3").code == 0
    (disk / "unet" / "notes.txt").write_text("mine")
    assert command(capsys, *steps, "1", "--overwrite").code == 0
    assert [path.name for path in (disk / "checkpoints").iterdir()] == ["step-00000001"]
    assert command(capsys, *steps, "2", "--resume", "latest").code == 0
    assert all((out / name).is_symlink() for name in ("checkpoints", "unet", "samples"))
    assert {path.name for path in (disk / "checkpoints").iterdir()} == {"step-00000001", "step-00000002"}
    assert {path.name for path in (disk / "unet").iterdir()} == {
        "config.json",
        "diffusion_pytorch_model.safetensors",
        "notes.txt",
    }
    assert dpo.models.load.load(str(out)).family.name == "sd"


def test_a_worker_that_dies_in_the_middle_of_an_update_is_one_line(start, tmp_path, capsys, monkeypatch, brief):
    def killed(run):  # torch raises it in the main thread, from its handler of the child's signal
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    at_update(monkeypatch, 2, killed)
    said = command(capsys, *start, "--steps", "3", "--checkpoint-every", "1")
    check_refused(said, ["a data worker died", "pid 7", "fewer --workers"])
    assert (tmp_path / "out" / STEP.format(1)).is_dir()


def full_disk_for_tensors(monkeypatch, **kwargs):
    def save_file(tensors, path):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", save_file)


def full_disk_for_the_result(monkeypatch, **kwargs):
    def save_pretrained(self, folder, **options):
        Path(folder, "unet").mkdir()
        Path(folder, "unet", "config.json").write_text("{")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("diffusers.StableDiffusionPipeline.save_pretrained", save_pretrained)


def full_disk_for_figures(monkeypatch, **kwargs):
    def write(self, record):
        if "loss" in record:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("dpo.training.trackers.Trackers._write", write)


@pytest.mark.long
@pytest.mark.parametrize("fill", [full_disk_for_tensors, full_disk_for_the_result, full_disk_for_figures])
def test_a_full_disk_leaves_nothing_half_written(start, tmp_path, capsys, monkeypatch, brief, fill):
    words = [*start, "--steps", "2", "--checkpoint-every", "1"]
    with monkeypatch.context() as patch:
        fill(patch)
        check_refused(command(capsys, *words), ["disk is full", "GiB left", "--resume latest"])
    out = tmp_path / "out"
    assert [name for name in tree(out) if ".part" in name or name.startswith("unet")] == []
    assert not (out / "model_index.json").exists()
    assert all(checkpoint.load(path) for path in checkpoint.listing(out / "checkpoints"))
    assert command(capsys, *words, "--resume", "latest").code == 0
    assert (out / "model_index.json").is_file() and (out / STEP.format(2)).is_dir()


# --- asked for and not available


def test_wandb_that_is_not_installed_stops_the_run_before_anything_is_read(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    said = command(capsys, "--wandb", "--output", tmp_path / "out")
    check_refused(said, ["--wandb", "not installed", "diffusion-dpo[tracking]"])
    assert said.log == [] and not (tmp_path / "out").exists()


@pytest.mark.long
def test_xformers_and_hub_cost_one_warning_each(start, tmp_path, capsys, monkeypatch, brief):
    monkeypatch.setattr("dpo.models.denoiser.find_spec", lambda name: None)
    said = command(capsys, *start, "--steps", "1", "--attention", "xformers", "--push-to-hub")
    assert said.code == 0 and said.errors == []
    for word in ("xformers is not installed", "not uploaded to the hub"):
        assert len(said.warnings(word)) == 1, said.log
    assert (tmp_path / "out" / "model_index.json").is_file()


@pytest.mark.long
def test_the_result_is_uploaded_without_its_checkpoints(start, tmp_path, capsys, monkeypatch, brief):
    """And again, by the command that is named when it fails, without training anew."""
    calls = []

    class Hub:
        def create_repo(self, name, private, exist_ok):
            if not calls:
                calls.append({})
                raise OSError("no network")
            return types.SimpleNamespace(repo_id=f"me/{name}")

        def model_info(self, name):
            return types.SimpleNamespace(private=True)

        def create_commit(self, name, operations, commit_message):
            calls.append({one.path_in_repo: name for one in operations})

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    said = command(capsys, *start, "--steps", "1", "--push-to-hub")
    (line,) = said.warnings("not uploaded to the hub")
    (tmp_path / "out" / ".env").write_text("secret")
    (tmp_path / "out" / "unet" / "key.pem").write_text("secret")
    again = command(capsys, *shlex.split(line.partition("python -m dpo.train ")[2]))
    assert again.code == 0 and any("https://huggingface.co/me/out" in row for row in again.log)
    _, uploaded = calls
    out = tmp_path / "out"
    files = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    kept = {name for name in files if name.startswith(("checkpoints/", ".")) or name.endswith(".pem")}
    assert set(uploaded) == files - kept and set(uploaded.values()) == {"me/out"}
    assert {"unet/diffusion_pytorch_model.safetensors", "model_index.json", "config.toml"} <= set(uploaded)


# --- starting over


@pytest.fixture
def foreground():
    """SIGINT interrupts, as on a terminal; a shell's background job, in which tests may run, ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_start_does_not_occupy_the_folder(
    start, tmp_path, capsys, monkeypatch, brief, foreground, number
):
    with monkeypatch.context() as patch:
        patch.setattr(samples, "before", lambda run: os.kill(os.getpid(), number))
        said = command(capsys, *start, "--steps", "1")
    assert said.code == 130 and said.errors == []
    assert [name for name in tree(tmp_path / "out") if name != "metrics.jsonl"] == []
    if number == signal.SIGTERM:
        assert command(capsys, *start, "--steps", "1").code == 0


def test_ctrl_c_again_while_the_checkpoint_is_written(start, tmp_path, capsys, monkeypatch, brief, foreground):
    save = checkpoint.save_tensors

    def interrupted(path, tensors):
        os.kill(os.getpid(), signal.SIGINT)
        return save(path, tensors)

    monkeypatch.setattr(checkpoint, "save_tensors", interrupted)
    at_update(monkeypatch, 2, lambda run: os.kill(os.getpid(), signal.SIGINT))
    said = command(capsys, *start, "--steps", "3", "--checkpoint-every", "0")
    assert (
        said.code == 130
        and said.errors == []
        and said.warnings("press Ctrl-C again")
        and said.warnings("stopped at once")
    )
    assert list((tmp_path / "out" / "checkpoints").iterdir()) == []


@pytest.mark.long
def test_overwriting_removes_the_earlier_result_before_it_trains(stopped, tmp_path, capsys, monkeypatch):
    def stop(run):
        raise KeyboardInterrupt

    at_update(monkeypatch, 1, stop)
    assert (tmp_path / "out" / "model_index.json").is_file()
    assert command(capsys, *stopped, "--overwrite").code == 130
    assert not (tmp_path / "out" / "model_index.json").exists(), "an old result must not pass for the new one"
    assert not (tmp_path / "out" / "checkpoints").exists()
    assert "overwrite = true" not in (tmp_path / "out" / "config.toml").read_text(), (
        "it is a --config of other runs too"
    )


@pytest.mark.long
@pytest.mark.parametrize("pairs", [1, 3])
def test_fewer_pairs_than_the_batch(start, tmp_path, capsys, brief, pairs):
    data = make_pickapic(tmp_path / "sehr kleine Menge", pairs)
    said = command(capsys, *start, "--data", data, "--batch-size", "4", "--epochs", "0.5")
    assert said.code == 0 and any("step 1/1" in line for line in said.log)


@pytest.mark.long
def test_a_resume_that_trains_nothing_leaves_what_was_trained(start, tmp_path, capsys, pageless):
    words = [*start, "--steps", "2", "--method", "discounted", "--beta", "500"]
    assert command(capsys, *words).code == 0
    out = tmp_path / "out"
    names = ("config.toml", "summary.json", "tables.json")
    before = {name: (out / name).read_text() for name in names}
    changed = ["--steps", "1", "--beta", "900", "--gamma", "0.5", "--learning-rate", "0.1", "--resume", "latest"]
    said = command(capsys, *words, *changed)
    assert said.code == 0 and said.warnings("2 updates were made before, and 1 asked for now: nothing is trained")
    assert not said.warnings("changed on resume"), "what trains nothing is not changed"
    assert {name: (out / name).read_text() for name in names} == before
    (out / "config.toml").unlink()
    (out / "summary.json").unlink()
    assert command(capsys, *words, *changed).code == 0
    assert "beta = 500.0" in (out / "config.toml").read_text()
    found = json.loads((out / "summary.json").read_text())
    assert (found["status"], found["steps"], found["resolved"]["beta"]) == ("finished", 2, 500.0)


@pytest.mark.long
def test_going_back_leaves_no_later_checkpoint_to_be_taken_for_the_newest(stopped, tmp_path, capsys, monkeypatch):
    """Else `latest` is that of the abandoned branch, and a limit of one deletes the checkpoint just written."""
    root = tmp_path / "out" / "checkpoints"
    back = [*stopped, "--resume", root / "step-00000001", "--learning-rate", "2e-5", "--checkpoints-limit", "1"]
    with monkeypatch.context() as patch:
        at_update(patch, 3, lambda run: signal.raise_signal(signal.SIGTERM))
        said = command(capsys, *back)
    assert said.code == 130 and said.warnings("step-00000002, step-00000003 were moved to")
    left = ["metrics.jsonl", "step-00000002", "step-00000003"]
    assert sorted(path.name for path in (root / "abandoned-1").iterdir()) == left
    assert checkpoint.find(root, "latest").state["config"]["learning_rate"] == 2e-5
    assert command(capsys, *back[:-4], "--learning-rate", "2e-5", "--resume", "latest").code == 0
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "event" not in line] == [1, 2, 3]


@pytest.mark.long
def test_an_abandoned_checkpoint_is_resumed_by_its_place(stopped, tmp_path, capsys):
    """Without any other flag than where and how far: its run's settings lie three folders above it."""
    out = tmp_path / "out"
    root = out / "checkpoints"
    assert command(capsys, *stopped, "--resume", root / "step-00000001", "--steps", "1").code == 0
    left = root / "abandoned-1" / "step-00000003"
    said = command(capsys, "--output", out, "--resume", left, "--steps", "4")
    assert said.code == 0 and any("3 updates done" in line for line in said.log), said
    for path in root.glob("*/policy.safetensors"):
        path.write_bytes(b"spoilt")
    said = command(capsys, "--output", out, "--resume", "latest", "--steps", "5")
    assert said.code == 2 and "abandoned-" in said.errors[0] and "--overwrite" not in said.errors[0]


def test_a_run_that_lost_its_place_between_branches_is_not_begun_anew(stopped, tmp_path, capsys):
    """As a kill leaves it while checkpoints are set aside."""
    root = tmp_path / "out" / "checkpoints"
    (root / "abandoned-1").mkdir()
    for path in checkpoint.listing(root):
        path.rename(root / "abandoned-1" / path.name)
    for result in ("model_index.json", "metrics.jsonl"):
        (tmp_path / "out" / result).unlink()
    said = command(capsys, *stopped, "--resume", "latest")
    assert said.code == 2 and "name one, such as --resume" in said.errors[0] and "step-00000003" in said.errors[0]


@pytest.mark.long
def test_a_result_without_its_checkpoints_is_not_trained_over(stopped, tmp_path, capsys):
    shutil.rmtree(tmp_path / "out" / "checkpoints")
    before = tree(tmp_path / "out")
    said = command(capsys, *stopped, "--resume", "latest")
    check_refused(said, ["has a result and no checkpoint to go on from", "another --output", "--overwrite"])
    assert tree(tmp_path / "out") == before


@pytest.mark.parametrize("meanwhile", [False, True])
def test_a_second_process_in_the_same_folder_is_turned_away(start, tmp_path, capsys, monkeypatch, meanwhile):
    """Also where the first one made the folder while the second was still loading."""
    monkeypatch.setattr(locks, "WAIT", 0.0)
    out, build = tmp_path / "out", loop.build.build
    with ExitStack() as first:

        def begin():
            out.mkdir()
            first.enter_context(locks.held(out, "--output"))

        def built(*words):
            run = build(*words)
            begin()
            return run

        if meanwhile:
            monkeypatch.setattr(loop.build, "build", built)
        else:
            begin()
        said = command(capsys, *start)
        check_refused(said, ["out is in use by process", str(os.getpid()), "name another folder"])
        assert sorted(path.name for path in out.iterdir()) == [".lock", ".lock.json"]


def test_a_run_that_another_process_made_meanwhile_is_not_replaced(start, tmp_path, capsys, monkeypatch):
    build = loop.build.build

    def built(*words):
        run = build(*words)
        (tmp_path / "out" / STEP.format(7)).mkdir(parents=True)
        (tmp_path / "out" / STEP.format(7) / "state.json").write_text('{"format": 1}')
        return run

    monkeypatch.setattr(loop.build, "build", built)
    check_refused(command(capsys, *start, "--resume", "latest"), ["out holds another run"])


def test_a_second_prepare_in_the_same_store_is_turned_away(world, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.0)
    words = ["--store", str(tmp_path), "--data", world("pairs"), "--model", world("sd15"), "--workers", "0"]
    with locks.held(tmp_path, "--store"):
        assert prepare.main(words) == 2
    assert f"dpo.prepare: --store {tmp_path} is in use by process {os.getpid()}" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == [".lock"]
