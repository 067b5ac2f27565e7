"""dpo.checkpoint: whole or absent under kills and full disks, verified on reading, exact for every optimizer."""

import errno
import json
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dpo.common import files
from dpo.common.errors import UserError
from dpo.training import checkpoint
from dpo.training.checkpoint import Damaged, copy_into, find, folder_of, listing, load, prune, save

ROOT = Path(__file__).parents[3]


def tensors_of(step: int) -> dict:
    generator = torch.Generator().manual_seed(step)
    return {
        "policy": {
            "a.weight": torch.randn(64, 32, generator=generator),
            "b.bias": torch.randn(7, generator=generator).bfloat16(),
        },
        "optimizer": {"0.step": torch.tensor(float(step)), "0.state1": torch.randint(0, 255, (64,), dtype=torch.uint8)},
        "tables": {"correction": torch.randn(1000, generator=generator, dtype=torch.float64)},
        "ema": {},
    }


def write(root: Path, step: int) -> Path:
    return save(folder_of(root, step), tensors_of(step), {"step": step, "position": 8 * step, "config": {"seed": 0}})


def hidden(root: Path) -> list[str]:
    return [path.name for path in root.iterdir() if path.name.startswith(".")]


# --- what is written ----------------------------------------------------------------------------------------------------


def test_round_trip(tmp_path):
    path = write(tmp_path, 500)
    assert path.name == "step-00000500" and hidden(tmp_path) == []
    found = load(path)
    assert found.state["step"] == 500 and found.state["position"] == 4000 and found.path == path
    expected = tensors_of(500)
    assert set(found.tensors) == {"policy", "optimizer", "tables"}
    for name in ("policy", "tables"):
        for key, value in expected[name].items():
            assert torch.equal(found.tensors[name][key], value) and found.tensors[name][key].dtype == value.dtype


def test_only_safetensors_and_json(tmp_path):
    """No pickle anywhere: nothing in a checkpoint can run code when it is read."""
    path = write(tmp_path, 1)
    assert sorted(p.name for p in path.iterdir()) == [
        "optimizer.safetensors", "policy.safetensors", "state.json", "tables.safetensors"
    ]  # fmt: skip
    for file in path.iterdir():
        head = file.read_bytes()[:2]
        assert head != b"\x80\x02" and head != b"PK"
        if file.suffix == ".safetensors":
            length = int.from_bytes(file.read_bytes()[:8], "little")
            json.loads(file.read_bytes()[8 : 8 + length])
    source = (ROOT / "dpo" / "training" / "checkpoint.py").read_text()
    assert "torch.load" not in source and "import pickle" not in source and "torch.save" not in source


def test_shared_memory_and_strides_are_stored(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    path = save(tmp_path / "step-00000001", {"policy": {"a": base, "b": base.T, "c": base[0], "d": base}}, {})
    stored = load(path).tensors["policy"]
    assert torch.equal(stored["b"], base.T) and torch.equal(stored["c"], base[0]) and torch.equal(stored["d"], base)


def test_the_name_appears_by_one_rename_of_a_whole_folder(tmp_path, monkeypatch):
    replace, seen = os.replace, []

    def watch(source, target):
        if Path(target) == folder_of(tmp_path, 7):
            assert not Path(target).exists()
            assert torch.equal(load(Path(source)).tensors["policy"]["a.weight"], tensors_of(7)["policy"]["a.weight"])
            seen.append(Path(source).name)
        replace(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", watch)
    write(tmp_path, 7)
    assert len(seen) == 1 and seen[0].startswith(".step-00000007.part-")


def test_saving_a_step_again_replaces_it(tmp_path):
    write(tmp_path, 3)
    save(folder_of(tmp_path, 3), {"policy": {"x": torch.ones(2)}}, {"step": 3, "again": True})
    assert load(folder_of(tmp_path, 3)).state["again"] is True
    assert list(load(folder_of(tmp_path, 3)).tensors["policy"]) == ["x"] and hidden(tmp_path) == []


# --- damage -------------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) - 5])


def alter(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("file", ["policy.safetensors", "optimizer.safetensors", "tables.safetensors", "state.json"])
@pytest.mark.parametrize("damage", [truncate, alter, Path.unlink])
def test_a_damaged_checkpoint_falls_back_to_the_one_before_and_says_so(tmp_path, caplog, file, damage):
    for step in (1, 2):
        write(tmp_path, step)
    damage(folder_of(tmp_path, 2) / file)
    with caplog.at_level(logging.WARNING, "dpo"):
        found = find(tmp_path, "latest")
    assert found.state["step"] == 1 and torch.equal(
        found.tensors["policy"]["a.weight"], tensors_of(1)["policy"]["a.weight"]
    )
    (message,) = [record.getMessage() for record in caplog.records]
    assert "step-00000002" in message and "trying the one before" in message and "\n" not in message
    with pytest.raises(Damaged):
        load(folder_of(tmp_path, 2))


@pytest.mark.parametrize(
    "value",
    ["[]", "null", "3", "{}", '{"format": 1}', '{"format": 1, "checksums": []}', '{"format": 1, "checksums": 5}'],
)
def test_a_state_that_is_not_one_is_damage(tmp_path, value):
    path = write(tmp_path, 1)
    (path / "state.json").write_text(value)
    with pytest.raises(Damaged):
        load(path)


def test_an_altered_number_in_the_state_is_noticed(tmp_path):
    path = write(tmp_path, 1)
    text = (path / "state.json").read_text()
    (path / "state.json").write_text(text.replace('"position": 8', '"position": 9'))
    with pytest.raises(Damaged, match="altered"):
        load(path)


def test_any_json_state_passes_its_own_seal(tmp_path):
    state = {
        "step": 1,
        "x": [0.1, 1e-300, 2**63, None, True, "ä"],
        "groups": ({"betas": (0.9, 0.999)},),
        "by": {"3": {"a": 1}, 4: 2},
    }
    path = save(tmp_path / "step-00000001", {"policy": {"x": torch.ones(2)}}, state)
    assert load(path).state["groups"] == [{"betas": [0.9, 0.999]}] and load(path).state["by"]["4"] == 2


def test_a_format_of_the_future_is_not_read(tmp_path):
    path = write(tmp_path, 1)
    state = json.loads((path / "state.json").read_text())
    (path / "state.json").write_text(json.dumps({**state, "format": 99}))
    with pytest.raises(Damaged):
        load(path)


def test_nothing_readable_is_a_user_error(tmp_path, caplog):
    for step in (1, 2):
        truncate(write(tmp_path, step) / "policy.safetensors")
    with pytest.raises(UserError, match=r"no checkpoint can be read .*step-00000002.*--overwrite") as caught:
        find(tmp_path, "latest")
    assert "\n" not in str(caught.value)


def test_nothing_there_is_a_user_error(tmp_path):
    for root in (tmp_path, tmp_path / "absent"):
        with pytest.raises(UserError, match=r"no checkpoint under .*; start without --resume"):
            find(root, "latest")
    with pytest.raises(UserError, match=r"no such checkpoint: .*nowhere"):
        find(tmp_path, str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"has none: --resume latest begins the run"):
        find(tmp_path, "nowhere")
    for step in (1, 20):
        write(tmp_path, step)
    with pytest.raises(UserError, match=r"such as \S*step-00000020$"):
        find(tmp_path, "nowhere")


def test_a_named_checkpoint_falls_back_only_to_older_ones(tmp_path, caplog):
    for step in (1, 2, 3):
        write(tmp_path, step)
    assert find(tmp_path, str(folder_of(tmp_path, 2))).state["step"] == 2
    alter(folder_of(tmp_path, 2) / "policy.safetensors")
    assert find(tmp_path, str(folder_of(tmp_path, 2))).state["step"] == 1


def test_an_old_checkpoint_that_cannot_be_deleted_is_no_reason_to_stop(tmp_path, monkeypatch, caplog):
    """As on NFS while another process reads it. What is left of it is not taken for a checkpoint, and goes later."""
    for step in (1, 2, 3):
        write(tmp_path, step)
    rmtree = shutil.rmtree

    def busy(path, ignore_errors=False):
        if not ignore_errors:
            (path / "policy.safetensors").unlink()
            raise OSError(errno.ENOTEMPTY, "Directory not empty")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        prune(tmp_path, 2)
        write(tmp_path, 3)  # over a checkpoint of the same step, which cannot be deleted either
        write(tmp_path, 3)
    assert "step-00000001 is not needed any more and cannot be deleted (Directory not empty)" in caplog.text
    assert [path.name for path in listing(tmp_path)] == ["step-00000002", "step-00000003"] and hidden(tmp_path)
    assert shutil.rmtree is rmtree
    prune(tmp_path, 2)
    assert hidden(tmp_path) == [] and load(folder_of(tmp_path, 3)).state["step"] == 3


def test_listing_and_prune(tmp_path):
    for step in (30, 4, 100):
        write(tmp_path, step)
    (tmp_path / "notes").mkdir()
    (tmp_path / ".step-00000005.part-123").mkdir()
    assert [path.name for path in listing(tmp_path)] == ["step-00000004", "step-00000030", "step-00000100"]
    prune(tmp_path, 2)
    assert [path.name for path in listing(tmp_path)] == ["step-00000030", "step-00000100"]
    assert hidden(tmp_path) == [] and (tmp_path / "notes").is_dir()
    for limit in (None, 0, 5):
        prune(tmp_path, limit)
        assert len(listing(tmp_path)) == 2


def test_what_a_kept_checkpoint_names_as_the_best_stays(tmp_path):
    """The newest two name updates 2 and 4 as the best so far; once neither is named, it goes."""
    for step, best in ((1, 1), (2, 2), (3, 2), (4, 4), (5, 4)):
        save(folder_of(tmp_path, step), tensors_of(step), {"step": step, "best": {"step": best}})
        prune(tmp_path, 2)
    assert [path.name[-1] for path in listing(tmp_path)] == ["4", "5"]
    save(folder_of(tmp_path, 6), tensors_of(6), {"step": 6, "best": {"step": 2}})
    prune(tmp_path, 1)
    assert [path.name[-1] for path in listing(tmp_path)] == ["6"], "update 2 is gone: it was of no kept one"
    save(folder_of(tmp_path, 7), tensors_of(7), {"step": 7, "best": {"step": 6}})
    prune(tmp_path, 1)
    assert [path.name[-1] for path in listing(tmp_path)] == ["6", "7"]


# --- a full disk --------------------------------------------------------------------------------------------------------


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("call", ["save_file", "os.fsync", "os.replace", "sealed"])
def test_a_full_disk_is_one_line_and_leaves_the_previous_checkpoint(tmp_path, monkeypatch, call):
    write(tmp_path, 1)
    owner, _, name = call.rpartition(".")
    with monkeypatch.context() as patch:
        patch.setattr(getattr(checkpoint, owner) if owner else checkpoint, name, no_space)
        with pytest.raises(UserError, match=r"the disk is full .*free some space.*--resume latest") as caught:
            write(tmp_path, 2)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"] and find(tmp_path, "latest").state["step"] == 1


def test_a_full_disk_inside_the_safetensors_writer(tmp_path, monkeypatch):
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise checkpoint.SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(UserError, match="the disk is full"):
        write(tmp_path, 1)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_replacement_of_a_checkpoint_keeps_a_readable_one(tmp_path, monkeypatch):
    """Saving the same step twice, the second time on a full disk: the first one must still be there."""
    write(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", no_space)
        with pytest.raises(UserError):
            write(tmp_path, 1)
    assert find(tmp_path, "latest").state["step"] == 1


def test_a_folder_that_may_not_be_written(tmp_path, monkeypatch):
    def denied(*args, **kwargs):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", denied)
    with pytest.raises(UserError, match=r"cannot write .*choose another --output"):
        save(tmp_path / "step-00000001", {"policy": {"x": torch.ones(1)}}, {})


def test_text_is_replaced_in_one_step(tmp_path, monkeypatch):
    path = tmp_path / "config.toml"
    files.write_text(path, "old")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", no_space)
        with pytest.raises(UserError, match="the disk is full"):
            files.write_text(path, "new")
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["config.toml"]
    files.write_text(path, "new")
    assert path.read_text() == "new"


# --- kills --------------------------------------------------------------------------------------------------------------

ARENA = """
import os, random, signal, sys, time
import torch
from pathlib import Path
from dpo.training import checkpoint
torch.set_num_threads(1)
root, kills, rng = Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3]))
blob = torch.arange(300_000, dtype=torch.float32)
last, caught = 0, 0
for _ in range(kills):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        for step in range(last + 1, 10**6):
            tensors = {"policy": {"w": blob + step}, "optimizer": {"0.s": blob * step}}
            checkpoint.save(checkpoint.folder_of(root, step), tensors, {"step": step})
            checkpoint.prune(root, 2)
            os.write(writer, b"%d " % step)
    os.close(writer)
    said = os.read(reader, 1000)  # at least one is whole
    time.sleep(rng.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    while block := os.read(reader, 1000):
        said += block
    os.close(reader)
    said = int(said.split()[-1])
    caught += bool(list(root.glob(".step-*")))
    found = checkpoint.find(root, "latest")
    last = found.state["step"]
    assert said <= last <= said + 1, (said, last)  # what it said is there; the next one may be too
    assert found.path.name == checkpoint.folder_of(root, last).name == checkpoint.listing(root)[-1].name
    assert torch.equal(found.tensors["policy"]["w"], blob + last) and torch.equal(found.tensors["optimizer"]["0.s"], blob * last)
    assert len(checkpoint.listing(root)) <= 3
checkpoint.prune(root, 2)
print(last, caught)
"""


@pytest.mark.long
@pytest.mark.parametrize("kills", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_killed_while_saving(tmp_path, kills):
    """SIGKILL at random moments: what lies under a checkpoint's name is whole, and the newest is what was last written."""
    done = subprocess.run(
        [sys.executable, "-c", ARENA, str(tmp_path), str(kills), "0"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "skipped" not in done.stderr  # no fallback was needed
    last, caught = map(int, done.stdout.split())
    assert last >= kills and caught > 0  # some kills did land inside a save
    assert hidden(tmp_path) == [] and 1 <= len(listing(tmp_path)) <= 2


# --- putting tensors back -----------------------------------------------------------------------------------------------


def test_copy_into_is_in_place():
    live = {"a": torch.zeros(3, requires_grad=True), "b": torch.zeros(2, 2)}
    address = live["a"].data_ptr()
    copy_into(live, {"b": torch.ones(2, 2), "a": torch.arange(3.0)}, "policy")
    assert live["a"].tolist() == [0, 1, 2] and live["a"].data_ptr() == address and live["a"].requires_grad


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"a": torch.zeros(3), "c": torch.zeros(2, 2)}, "belongs to another model or other LoRA settings"),
        ({"a": torch.zeros(3)}, "belongs to another model"),
        (
            {"a": torch.zeros(3), "b": torch.zeros(2, 3)},
            r"has b as torch.float32 \(2, 3\), the run wants torch.float32 \(2, 2\)",
        ),
        ({"a": torch.zeros(3).double(), "b": torch.zeros(2, 2)}, "has a as torch.float64"),
    ],
)
def test_copy_into_refuses_what_does_not_fit(saved, message):
    with pytest.raises(UserError, match=message) as caught:
        copy_into({"a": torch.zeros(3), "b": torch.zeros(2, 2)}, saved, "policy")
    assert "\n" not in str(caught.value)


# --- history ------------------------------------------------------------------------------------------------------------


def test_going_back_moves_later_checkpoints_aside(tmp_path, caplog):
    for step in (2, 4, 6, 8):
        write(tmp_path, step)
    checkpoint.go_on_from(folder_of(tmp_path, 4), tmp_path, 4)
    assert [path.name for path in listing(tmp_path)] == ["step-00000002", "step-00000004"]
    assert "step-00000006, step-00000008 were moved to" in caplog.text and "abandoned-1" in caplog.text
    assert find(tmp_path, "latest").state["step"] == 4
    assert find(tmp_path, str(tmp_path / "abandoned-1")).state["step"] == 8
    write(tmp_path, 6)
    checkpoint.go_on_from(folder_of(tmp_path, 2), tmp_path, 2)
    assert sorted(path.name for path in (tmp_path / "abandoned-2").iterdir()) == ["step-00000004", "step-00000006"]


@pytest.mark.parametrize("links", [True, False])
def test_going_on_from_another_run_moves_all_aside_and_has_its_checkpoint(tmp_path, monkeypatch, links):
    """A kill before the first own checkpoint costs nothing: `latest` is the one that was gone on from."""
    if not links:
        monkeypatch.setattr(os, "link", lambda *paths: (_ for _ in ()).throw(OSError("no links here")))
    other, own = write(tmp_path / "other", 4), tmp_path / "own"
    write(own, 2), write(own, 4), write(own, 8)
    before = (other / "state.json").read_bytes()
    checkpoint.go_on_from(other, own, 4)
    assert listing(own) == [folder_of(own, 4)] and listing(tmp_path / "other") == [other]
    assert len(listing(own / "abandoned-1")) == 3 and len(list(own.iterdir())) == 2
    assert find(own, "latest").state == find(tmp_path / "other", "latest").state
    assert (folder_of(own, 4) / "state.json").read_bytes() == before


def test_a_branch_comes_back_with_its_lines(tmp_path):
    """metrics.jsonl is of the branch whose weights go on, whichever was the last."""
    lines, root = tmp_path / "metrics.jsonl", tmp_path / "checkpoints"
    for step in (2, 4, 6):
        write(root, step)
    lines.write_text("the first branch")
    checkpoint.go_on_from(folder_of(root, 2), root, 2)
    write(root, 4)
    lines.write_text("the second branch")
    checkpoint.go_on_from(folder_of(root / "abandoned-1", 4), root, 4)
    assert lines.read_text() == "the first branch" and listing(root) == [folder_of(root, 4)]
    assert (root / "abandoned-2" / "metrics.jsonl").read_text() == "the second branch"
    assert len(listing(root / "abandoned-2")) == 2
    assert checkpoint.set_aside(root)[-1] == folder_of(root / "abandoned-2", 4)


def test_of_many_branches_the_newest_is_the_last(tmp_path):
    for number in (2, 10, 9):
        write(tmp_path / f"abandoned-{number}", number)
    assert [path.parent.name for path in checkpoint.set_aside(tmp_path)] == [
        "abandoned-2",
        "abandoned-9",
        "abandoned-10",
    ]


def test_going_on_from_the_newest_moves_nothing(tmp_path):
    write(tmp_path, 2)
    checkpoint.go_on_from(write(tmp_path, 4), tmp_path, 4)
    assert len(listing(tmp_path)) == len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("which", ["latest", "run"])
def test_the_last_healthy_one_comes_before_one_that_had_diverged(tmp_path, which, caplog):
    root = tmp_path / "checkpoints"
    write(root, 2)
    save(folder_of(root, 3), tensors_of(3), {"step": 3, "diverged": True})
    which = which if which == "latest" else str(tmp_path)
    assert find(root, which).state["step"] == 2 and "had diverged" in caplog.text
    assert find(root, str(folder_of(root, 3))).state["step"] == 3
    (folder_of(root, 2) / "policy.safetensors").unlink()
    assert find(root, which).state["step"] == 3  # better than nothing
