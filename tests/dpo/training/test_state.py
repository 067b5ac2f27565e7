"""dpo.training.state: a checkpoint without something that a run goes on from is damaged, however well it is sealed."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from dpo.common import files
from dpo.common.errors import UserError
from dpo.train import train_step
from dpo.training import checkpoint, state
from tests.help.running import make_run


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """The checkpoints of a run of two updates, one after each."""
    words = ["--batch-size", "2", "--steps", "2", "--ema", "0.9"]
    run = make_run(world("sd15"), world("pairs"), tmp_path_factory.mktemp("made") / "run", *words)
    batches = run.batches()
    for _ in range(2):
        train_step(run, [next(batches)])
        run.count()
        state.snapshot(run)
    batches.close()
    return run.checkpoints


def change_state(folder, alter) -> None:
    """Alters state.json and seals it anew."""
    content, _ = files.unseal((folder / "state.json").read_text(), "seal")
    alter(content)
    (folder / "state.json").write_text(files.sealed(content, "seal"))


def without_tensor(folder, group: str, *, named: bool) -> None:
    """Takes the last tensor out of a file and seals the checkpoint anew; named: the state still says that it is there."""
    path = folder / f"{group}.safetensors"
    tensors = load_file(path)
    del tensors[max(tensors)]
    save_file(tensors, path)

    def alter(content):
        content["checksums"][group] = files.checksum(path)
        if not named:
            del content["contents"]

    change_state(folder, alter)


def without_group(folder, group: str, *, named: bool) -> None:
    def alter(content):
        del content["checksums"][group]
        if not named:
            del content["contents"]

    (folder / f"{group}.safetensors").unlink()
    change_state(folder, alter)


SPOILED = {
    **{f"no {key}": lambda folder, key=key: change_state(folder, lambda c: c.pop(key)) for key in state.KEYS},
    "no checksums": lambda folder: change_state(folder, lambda c: c.pop("checksums")),
    "a step that is text": lambda folder: change_state(folder, lambda c: c.update(step="2")),
    **{
        f"no {group}, {named}": lambda folder, group=group, named=named: without_group(folder, group, named=named)
        for group in ("policy", "optimizer", "tables")
        for named in (True, False)
    },
    "no ema": lambda folder: without_group(folder, "ema", named=True),
    **{
        f"a tensor less in {group}": lambda folder, group=group: without_tensor(folder, group, named=True)
        for group in ("policy", "optimizer", "tables", "ema")
    },
    **{
        f"a tensor less in {group}, of an earlier version": lambda folder, group=group: without_tensor(
            folder, group, named=False
        )
        for group in ("policy", "ema")
    },
}


@pytest.mark.parametrize("what", SPOILED)
def test_the_one_before_an_incomplete_one_is_taken(made, tmp_path, caplog, what):
    root = tmp_path / "checkpoints"
    shutil.copytree(made, root)
    newest = checkpoint.listing(root)[-1]
    assert checkpoint.find(root, "latest", state.check_complete).path == newest
    SPOILED[what](newest)
    assert checkpoint.find(root, "latest", state.check_complete).state["step"] == 1
    assert "checkpoint skipped: " in caplog.text and "trying the one before" in caplog.text


def test_what_is_written_is_what_is_asked_for(made):
    found = checkpoint.load(checkpoint.listing(made)[-1])
    assert state.KEYS.keys() <= found.state.keys() and state.GROUPS.keys() <= found.tensors.keys()
    state.check_complete(found)


def test_without_another_it_is_one_line(made, tmp_path):
    root = tmp_path / "checkpoints"
    shutil.copytree(made, root)
    for folder in checkpoint.listing(root):
        change_state(folder, lambda content: content.pop("position"))
    with pytest.raises(UserError, match="no checkpoint can be read .*step-00000002 is incomplete: it lacks position"):
        checkpoint.find(root, "latest", state.check_complete)
