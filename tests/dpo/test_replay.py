"""dpo.replay: what it says and writes, what it refuses in one line, and that it leaves the run's folder as it is."""

import hashlib
import json
import shutil

import pytest

from dpo import replay, train
from dpo.pages.folder import read_run
from tests.help.pages import Page
from tests.help.running import leave, make_run
from tests.help.worlds import make_folders

FLAGS = ["--batch-size", "2", "--steps", "9", "--learning-rate", "1e-4", "--checkpoints-limit", "0"]
HELD_OUT = ["--validation-fraction", "0.2", "--validate-every", "3"]


@pytest.fixture(scope="module")
def made(world, tmp_path_factory):
    """A run of seven updates of nine with checkpoints after 2, 4 and 6; only read by the tests."""
    root = tmp_path_factory.mktemp("replay")
    pairs = make_folders(root / "pairs", 12)
    leave(make_run(world("sd15"), str(pairs), root / "run", *FLAGS, *HELD_OUT), 7, 2)
    return root / "run"


@pytest.fixture
def said(capsys):
    """The command: exit code, stdout, and what is no log line on stderr."""

    def say(*words):
        capsys.readouterr()
        code = replay.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out, [line for line in err.splitlines() if line.startswith("dpo.replay: ")]

    return say


def state(folder):
    """Every path in a folder and the folder itself: time of change, and the content of files."""
    paths = [folder, *sorted(folder.rglob("*"))]
    return {
        str(path): (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None)
        for path in paths
    }


@pytest.mark.long
def test_an_update_is_listed_and_equal_bit_for_bit(made, said, tmp_path):
    before, output = state(made), tmp_path / "found"
    code, out, errors = said(made, "--update", "6", "--output", output)
    assert (code, errors) == (0, []) and state(made) == before, "the run's folder is only read"
    assert "2 updates made again from step-00000004" in out and "All figures of 2 logged updates equal" in out
    assert out.rstrip().endswith(str(output / "replay.html"))
    found = json.loads((output / "replay.json").read_text(encoding="utf-8"))
    update = read_run(made).updates[5]
    assert {name: update[name] for name in found["figures"]} == found["figures"]
    assert sum(pair["share"] for pair in found["pairs"]) == pytest.approx(1)
    assert sum(pair["loss"] for pair in found["pairs"]) / 2 == pytest.approx(update["loss"], rel=1e-12)
    assert all(pair["key"] in out and pair["images"]["win"].endswith(".jpg") for pair in found["pairs"])
    assert len(list((output / "images").glob("0[12]-*.png"))) == 4
    page = Page((output / "replay.html").read_text(encoding="utf-8"))
    assert all(pair["caption"] in page.text and pair["key"] in page.text for pair in found["pairs"])
    assert said(made, "--update", "6", "--output", output)[0] == 0, "the same command again takes its place"


@pytest.mark.long
def test_updates_around_it_are_made_again_with_a_change(made, said, tmp_path):
    code, out, _ = said(made, "--update", "5", "--around", "1", "--beta", "500", "--output", tmp_path / "found")
    assert code == 0 and "Updates 4 to 6 made again with beta 2000.0 -> 500.0" in out
    found = json.loads((tmp_path / "found" / "replay.json").read_text(encoding="utf-8"))
    old, new = found["curves"]
    steps = [4, 5, 6]
    assert [one["step"] for one in old["updates"]] == [one["step"] for one in new["updates"]] == steps
    updates = {update["step"]: update for update in read_run(made).updates}
    assert all(updates[one["step"]]["loss"] == one["loss"] for one in old["updates"])
    first, second = old["updates"][0], new["updates"][0]
    assert second["difference_mean"] == first["difference_mean"], "before the first of them the state is the same"
    assert second["margin_mean"] == pytest.approx(first["margin_mean"] / 4, rel=1e-5)
    assert new["updates"][2]["difference_mean"] != old["updates"][2]["difference_mean"]
    assert old["heldout"]["heldout_pairs"] == new["heldout"]["heldout_pairs"] > 0
    assert (
        out.count("held-out accuracy") == 2
        and Page((tmp_path / "found" / "replay.html").read_text("utf-8")).tags.count("svg") == 4
    )


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--update", "9"], "has made 7 updates: give --update a number from 1 to 8"),
        (["--update", "0"], "argument --update: 0 is below 1"),
        (["--update", "3", "--without", "x"], "x is no key of a pair: give a whole number, as the replay lists them"),
        (["--update", "3", "--around", "2"], "--around has no effect without"),
        (["--update", "3", "--beta", "-1"], "beta"),
        (["--update", "3", "--method", "dpoo"], "method"),
        (["--update", "3", "--output", "{run}"], "lies in the run's own folder, which is only read"),
        (["--update", "3", "--output", "{run}/samples"], "lies in the run's own folder, which is only read"),
        (["--update", "3", "--output", "{run}/.."], "has the run's folder in it"),
        (["--update", "3", "--output", "{run}/../pairs"], "has files in it and no replay"),
        (["--update", "3", "--device", "tpu"], "device = tpu: expected auto, cpu, cuda or cuda:N"),
    ],
)
def test_mistakes_are_refused_in_one_line(made, said, words, message):
    before = state(made.parent)
    code, out, errors = said(made, *(word.format(run=made) for word in words))
    assert (code, out) == (2, "") and len(errors) == 1 and message in errors[0], errors
    assert state(made.parent) == before


def test_a_folder_that_is_no_run_is_refused(made, said):
    code, _, errors = said(made.parent / "pairs", "--update", "1")
    assert code == 2 and len(errors) == 1 and "holds no run" in errors[0]


def test_several_processes_are_refused(made, said, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, errors = said(made, "--update", "1")
    assert code == 2 and errors == ["dpo.replay: started as 2 processes: a replay is made by one; leave out torchrun"]


def test_an_unknown_key_is_refused_before_anything_is_made(made, said, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "train_step", None)
    code, _, errors = said(made, "--update", "3", "--without", "12", "--output", tmp_path / "found")
    assert code == 2 and "--without 12: no pair of updates 1 to 9 has this key" in errors[0]
    assert not (tmp_path / "found").exists()


def test_pairs_that_have_moved_are_named(made, said, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(made.parent, root)
    toml = (root / "run" / "config.toml").read_text(encoding="utf-8")
    (root / "run" / "config.toml").write_text(toml.replace(str(made.parent), str(root)), encoding="utf-8")
    shutil.rmtree(root / "run" / "checkpoints")
    (root / "pairs").rename(root / "moved")
    code, _, errors = said(root / "run", "--update", "1")
    assert code == 2 and len(errors) == 1 and "pairs: no such file or folder" in errors[0], errors
    assert errors[0].endswith("where it is elsewhere now, say where with --data")
    code, out, _ = said(root / "run", "--update", "1", "--data", root / "moved")
    assert code == 0 and "1 update made again from the start of the run" in out and "bit for bit" in out
    assert (root / "run-replay-1" / "replay.html").is_file(), "beside the run, where no folder is named"


def test_other_pairs_are_refused(made, said, tmp_path):
    other = make_folders(tmp_path / "other", 13)
    code, _, errors = said(made, "--update", "3", "--data", other, "--output", tmp_path / "found")
    assert code == 2 and f"{other} does not hold the pairs that the run was trained on" in errors[0]


def test_ctrl_c_is_one_line(made, said, monkeypatch, tmp_path):
    def stopped(run, batches):
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "train_step", stopped)
    code, out, errors = said(made, "--update", "3", "--output", tmp_path / "found")
    assert (code, out, errors) == (130, "", ["dpo.replay: interrupted"]) and not (tmp_path / "found").exists()
