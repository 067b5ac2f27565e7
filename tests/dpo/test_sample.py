"""python -m dpo.sample: killed and resumed, shared, merged, locked; a mistake costs one line."""

import json
import os
import random
import re

import pytest

from dpo import sample
from dpo.common import locks
from dpo.drawing.images import read_set
from tests.help.children import kill_until_done
from tests.help.drawing import QUICK, drawn, files


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    rows = ["<script>alert(1)</script>", "../../x", "x" * 10_000, "🦊 \u202e rtl", "a\0b", "two\nlines"]
    path.write_text("\n".join(json.dumps({"prompt": text}) for text in rows), "utf-8")
    return str(path)


@pytest.fixture(scope="module")
def words(world, prompts):
    return [world("sd15"), "--prompts", prompts, "--seeds", "3", "--batch", "3", *QUICK]


@pytest.fixture(scope="module")
def whole(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "out"
    assert sample.main([*words, "--output", str(folder)]) == 0
    return files(folder)


@pytest.mark.long
@pytest.mark.parametrize("kills", [2, pytest.param(10, marks=pytest.mark.slow)])
@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is a fork here")
def test_killed_and_started_again_it_gives_the_same_bytes(words, whole, tmp_path, kills):
    out = tmp_path / "out"
    kill_until_done(lambda: sample.main([*words, "--output", str(out)]), random.Random(kills), kills, 1.5)
    assert files(out) == whole


def test_hostile_prompts_are_kept_as_they_are(whole, words, tmp_path):
    assert sum(name.startswith("images/") for name in whole) == 18 and set(whole) - {"protocol.json"} == {
        name for name in whole if name.startswith("images/")
    }


@pytest.mark.long
def test_shards_share_a_folder_and_the_last_one_finishes(words, whole, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    code, err = drawn(capsys, *words, "--output", out, "--shard", "1/2")
    assert code == 0 and "the last one writes the sheets" in err
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert drawn(capsys, *words[:-4], "--output", out, "--device", "cpu")[0] == 0  # with sheets
    sheets = [name for name in files(out) if name.startswith("sheets/")]
    assert sheets == ["sheets/sheet-000.png"]
    assert {name: data for name, data in files(out).items() if name not in sheets} == whole


@pytest.mark.long
def test_folders_of_shards_are_merged(words, whole, tmp_path, capsys):
    for part in range(2):
        assert drawn(capsys, *words, "--output", tmp_path / f"p{part}", "--shard", f"{part}/2")[0] == 0
    code, err = drawn(capsys, "--merge", tmp_path / "p0", "--output", tmp_path / "out", "--sheets", "0")
    assert code == 2 and "9 of 18 images are missing" in err
    assert (
        drawn(capsys, "--merge", tmp_path / "p0", tmp_path / "p1", "--output", tmp_path / "out", "--sheets", "0")[0]
        == 0
    )
    assert files(tmp_path / "out") == whole


@pytest.mark.long
def test_merged_parts_are_laid_out_as_the_whole_is(world, tmp_path, capsys):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in ("one", "two", "three"):
        (prompts / f"{name}.txt").write_text(f"a {name}")
    drawing = [world("sd15"), "--prompts", prompts, "--seeds", "4", "--batch", "4", *QUICK]
    assert drawn(capsys, *drawing, "--layout", "dpg", "--output", tmp_path / "whole")[0] == 0
    for part in range(2):
        assert drawn(capsys, *drawing, "--output", tmp_path / f"p{part}", "--shard", f"{part}/2")[0] == 0
    parts = ["--merge", tmp_path / "p0", tmp_path / "p1", "--sheets", "0", "--output", tmp_path / "out"]
    code, err = drawn(capsys, *parts, "--layout", "dpg", "--prompts", "a one")
    assert code == 2 and "were drawn from others; name those, as then" in err.splitlines()[-1]
    assert drawn(capsys, *parts, "--layout", "dpg", "--prompts", prompts)[0] == 0
    assert files(tmp_path / "out") == files(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "out" / "layout-dpg").iterdir()) == [
        "one.png",
        "three.png",
        "two.png",
    ]


def test_two_processes_do_not_share_a_folder(words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(locks, "WAIT", 0.1)
    out = tmp_path / "out"
    out.mkdir()
    with locks.held(out, "--output"):
        code, err = drawn(capsys, *words, "--output", out)
    assert code == 2 and f"dpo.sample: --output {out} is in use by process {os.getpid()}" in err


@pytest.mark.long
def test_progress_says_images_a_second_and_the_share_outside_the_unet(words, tmp_path, capsys):
    _, err = drawn(capsys, *words, "--output", tmp_path / "out")
    assert (
        "image 18/18" in err
        and re.search(r"image 6/18  .* images/s  ETA \d+s", err)
        and "% of the time outside the denoiser" in err
    )


@pytest.mark.long
def test_another_protocol_is_refused(words, tmp_path, capsys):
    out = tmp_path / "out"
    assert drawn(capsys, *words, "--output", out)[0] == 0
    code, err = drawn(capsys, *words, "--output", out, "--sampler", "euler")
    assert code == 2 and 'sampler: "PNDMScheduler" there, "EulerDiscreteScheduler" now' in err


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ([], "name the folder of a run"),
        (["m", "--strength", "0.5"], "--init-image"),
        (["m"], "no prompts: give --prompts"),
        (["m", "--prompts", "x", "--width", "500"], "no multiple of 8"),
        (["m", "--prompts", "x", "--vae-tile", "520"], "no multiple of 32"),
        (["m", "--prompts", "x", "--seeds", "0"], "0 is below 1"),
        (["m", "--prompts", "x", "--steps", "many"], "invalid whole number value"),
        (["m", "--prompts", "x", "--first-seed", "-1"], "is not in 0 to 2^32"),
        (["m", "--prompts", "x", "--init-image", "examples", "--strength", "0.5,1.5"], "at most 1"),
        (["m", "--prompts", "x", "--sampler", "magic"], "invalid choice"),
        (["m", "--prompts", "x", "--shard", "2/2"], "--shard 2/2"),
        (["m", "--prompts", "x", "--layout", "dpg"], "--seeds 4"),
        (["m", "--prompts", "x"], "no such model"),
        (["embedded", "--prompts", "x", "--base", "none"], "no such model: none"),
        (["embedded", "--prompts", "x", "--base", ""], "no model to draw with"),
        (["", "--prompts", "x"], "no model to draw with"),
        (["embedded", "--prompts", "x", "--lora-base", "m"], "embedded is a whole model, no LoRA"),
        (["embedded", "--prompts", "x", "--subset-seed", "3"], "give that too, or leave it out"),
        (
            ["embedded", "--prompts", "x", "--first-seed", "4294967295", "--seeds", "2"],
            "the last seed would be 4294967296",
        ),
        (["embedded", "--prompts", "x", "--seeds", "100000000000"], "100,000,000,000 images"),
        (["embedded", "--prompts", "x", "--steps", "1001"], "--steps 1001: the model knows 1000 timesteps"),
        (["embedded", "--prompts", "x", "--device", "foo"], "--device foo: there is no such device"),
        (["embedded", "--prompts", "x", "--device", "meta"], "--device meta: runs on cpu or cuda"),
        (["embedded", "--prompts", "x", "--width", "1000000"], "no multiple of 8 from 8 to 16384"),
        (["embedded", "--prompts", "x", "--output", ""], "--output: names no folder"),
        (["embedded", "--merge", "x"], "MODEL is of the drawing"),
        (["--merge", "x", "--steps", "3"], "--steps is of the drawing"),
        (["m", "--prompts", "partiprompts"], "partiprompts:FOLDER"),
        (["m", "--prompts", "x", "--guidance", "nan"], "nan is not in 0 to 1000"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, capsys, extra, told):
    code, err = drawn(capsys, "--output", tmp_path / "out", *extra)
    lines = [line for line in err.splitlines() if line.startswith("dpo.sample: ")]
    assert code == 2 and len(lines) == 1 and told in lines[0] and "Traceback" not in err
    assert not list(tmp_path.glob("out/images/*.png"))


def test_help_is_in_groups_and_fits_the_sets(capsys):
    from dpo.drawing.layouts import LAYOUTS
    from dpo.drawing.prompts import PUBLISHED

    with pytest.raises(SystemExit):
        sample.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert [name for name in PUBLISHED if name not in text] == [] and tuple(LAYOUTS) == sample.LAYOUTS
    assert "how: the protocol:" in text and "from an image (SDEdit):" in text


@pytest.mark.slow
def test_memory_is_flat_over_five_thousand_images(world, tmp_path, capsys):
    import threading
    import time
    from pathlib import Path

    statm, page = Path("/proc/self/statm"), os.sysconf("SC_PAGE_SIZE")
    seen, over = [], threading.Event()

    def watch():
        while not over.wait(1.0):
            seen.append((time.monotonic(), int(statm.read_text().split()[1]) * page))

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        words = [
            world("sd15"),
            "--prompts",
            "a",
            "b",
            "--seeds",
            "2500",
            "--steps",
            "1",
            "--guidance",
            "1",
            "--batch",
            "10",
        ]
        assert drawn(capsys, *words, "--sheets", "1", "--device", "cpu", "--output", tmp_path / "out")[0] == 0
    finally:
        over.set()
        watcher.join()
    third = len(seen) // 3
    early, late = (max(rss for _, rss in part) for part in (seen[third : 2 * third], seen[2 * third :]))
    assert len(read_set(tmp_path / "out")) == 5000
    assert late - early < 32 * 2**20


@pytest.mark.long
@pytest.mark.parametrize("name", ["images", "sheets", "images/000001-*.png", "protocol.json", "sheets/sheet-000.png"])
def test_what_stands_in_the_way_is_one_line(world, tmp_path, capsys, name):
    """A file where a folder must be, a folder where a file must be."""
    words = [world("sd15"), "--prompts", "a", "b", "--batch", "2", "--steps", "1", "--guidance", "1", "--device", "cpu"]
    out, first = tmp_path / "out", tmp_path / "first"
    assert drawn(capsys, *words, "--output", first)[0] == 0
    (path,) = first.glob(name)
    place = out / path.relative_to(first)
    place.parent.mkdir(parents=True)
    place.write_text("") if path.is_dir() else place.mkdir()
    code, err = drawn(capsys, *words, "--output", out)
    lines = [line for line in err.splitlines() if line.startswith("dpo.sample: ")]
    assert code == 2 and len(lines) == 1 and place.name in lines[0] and "unexpected" not in lines[0], err


def test_a_full_disk_says_the_command_that_goes_on(world, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    words = [world("sd15"), "--prompts", "a", "--steps", "1", "--guidance", "1", "--device", "cpu", "--output"]
    assert drawn(capsys, *words, tmp_path / "out")[0] == 0
    monkeypatch.setattr("dpo.common.files.sync_file", full)
    for place in (tmp_path / "out", tmp_path / "new"):  # the sheets; the protocol
        code, err = drawn(capsys, *words, place)
        assert code == 2 and "the disk is full" in err and "then start the same command again" in err, err
