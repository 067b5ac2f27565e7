"""Drawing, scoring and labelling, killed or interrupted at random moments: the same command ends as if nothing had been."""

import json
import os
import random
import re
import signal
import sqlite3
import time
from contextlib import closing, suppress

import numpy as np
import pytest
from PIL import Image

from dpo import evaluate, label, sample
from dpo.common import files as common_files
from tests.help import worlds
from tests.help.children import start_command
from tests.help.drawing import files

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is a fork here")

PICTURES = 144  # of a side
JUDGE = "tests.help.judges:Together"
STEP = 60.0  # seconds in which a child gets on, on a busy machine


@pytest.fixture(scope="module")
def drawing(world):
    """The words of a drawing of 12 groups and two sheets, without its output."""
    prompts = [f"prompt {number}" for number in range(12)]
    return [
        world("sd15"), "--prompts", *prompts, "--seeds", "3", "--batch", "3", "--steps", "3", "--guidance", "2",
        "--sheets", "2", "--device", "cpu",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def scoring(tmp_path_factory):
    """The words of an evaluation of two folders, without its output; some pictures are there several times."""
    root = tmp_path_factory.mktemp("sides")
    for number, side in enumerate(("a", "b")):
        (root / side).mkdir()
        rows = []
        for place in range(PICTURES):
            shown = place - 30 * (place >= 30 and place % 3 == 2)  # a third is there twice, read ahead together
            dice = np.random.default_rng([number, shown])
            Image.fromarray(dice.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(root / side / f"{place:03d}.png")
            rows.append({"file": f"{place:03d}.png", "prompt": f"prompt {shown % 50}", "seed": place})
        (root / side / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return [str(root / "a"), str(root / "b"), "--scorers", JUDGE, "tiny-b"]


@pytest.fixture(scope="module")
def labelling(tmp_path_factory):
    """The words of a labelling of a set into nine files by a vote, without its output; some pairs are judged twice."""
    pairs = worlds.make_pickapic(
        tmp_path_factory.mktemp("pairs"), 64, ties=4, unlabelled=4, duplicates=8, shards=3, size=(64, 64)
    )
    return ["--data", str(pairs), "--scorers", JUDGE, "tiny-b=2", "--labels", "soft", "--rows-per-file", "9"]


def drawn(folder):
    return len(list(folder.glob("images/*.png")))


def scored(folder):
    """Scores that are kept in the folder of an evaluation."""
    return len(scores(folder))


def scores(folder):
    with suppress(sqlite3.Error):
        path = f"file:{folder / 'scores.sqlite'}?mode=ro"
        with closing(sqlite3.connect(path, uri=True)) as base:
            return sorted(base.execute("SELECT key, value FROM scores"))
    return []


def evaluation(folder):
    """What an evaluation leaves but for times, and where it lies."""
    texts = {name: (folder / f"evaluation.{name}").read_text("utf-8") for name in ("json", "md", "html")}
    texts = {name: text.replace(str(folder), "OUT") for name, text in texts.items()}
    texts["json"] = re.sub(r'"seconds": [\d.]+', "", texts["json"])
    texts["html"] = re.sub(r"<td>seconds</td><td>[\d.]+</td>", "", texts["html"])
    assert {name for name in files(folder) if not name.startswith("images/")} == {
        "scores.sqlite", *(f"evaluation.{name}" for name in texts)
    }  # fmt: skip
    return texts, scores(folder)


def judged(folder):
    """Scores that are kept in the folder of a labelled set, and files of it."""
    return scored(folder) + 40 * len(list(folder.glob("data/*.parquet")))


def pairs_of(folder):
    """What a labelling leaves, and its scores."""
    return {name: data for name, data in files(folder).items() if name != "scores.sqlite"}, scores(folder)


KINDS = {
    "drawing": (sample.main, drawn, files),
    "scoring": (evaluate.main, scored, evaluation),
    "labelling": (label.main, judged, pairs_of),
}


@pytest.fixture(
    scope="module", params=["drawing", *(pytest.param(one, marks=pytest.mark.slow) for one in ("scoring", "labelling"))]
)
def once(request, tmp_path_factory):
    """(main, words, how far it is, what it leaves, the same of one go)."""
    main, progress, left = KINDS[request.param]
    words = request.getfixturevalue(request.param)
    straight = tmp_path_factory.mktemp(request.param)
    log = straight / "log.txt"
    child = start_command([*words, "--output", str(straight / "out")], log, main)
    assert ended(child) == 0, log.read_text()[-3000:]
    return main, words, progress, left, left(straight / "out")


def ended(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def struck(child, blow, progress, out, dice):
    """Sends a signal once a child has got on by none to three steps and a moment; its exit code."""
    aim = progress(out) + dice.choice([0, 0, 1, 1, 4])
    end = time.monotonic() + (dice.uniform(0, 1) if aim == progress(out) else STEP)
    while time.monotonic() < end and not (progress(out) >= aim > 0):
        found, status = os.waitpid(child, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    time.sleep(dice.uniform(0, 0.1))
    os.kill(child, blow)
    return ended(child)


@pytest.mark.parametrize(
    ("kills", "fresh"), [(3, False), pytest.param(10, True, marks=pytest.mark.slow)], ids=["fork", "python -m"]
)
def test_killed_again_and_again_it_leaves_the_same(once, tmp_path, kills, fresh):
    main, words, progress, left, whole = once
    out, dice, log, codes, far = tmp_path / "out", random.Random(kills), tmp_path / "log.txt", [], []
    while len(codes) < kills:
        child = start_command([*words, "--output", str(out)], log, main, fresh=fresh)
        codes.append(struck(child, signal.SIGKILL, progress, out, dice))
        far.append(progress(out))
    print(codes, far)
    assert codes.count(-signal.SIGKILL) >= kills - 1 and len(set(far)) > kills // 2, log.read_text()[-3000:]
    assert ended(start_command([*words, "--output", str(out)], log, main, fresh=fresh)) == 0, log.read_text()[-3000:]
    assert left(out) == whole and not list(out.rglob("*.part-*"))


@pytest.mark.parametrize(
    ("times", "fresh"), [(1, False), pytest.param(5, True, marks=pytest.mark.slow)], ids=["fork", "python -m"]
)
def test_ctrl_c_is_one_line_that_says_how_to_go_on(once, tmp_path, times, fresh):
    main, words, progress, left, whole = once
    out, dice, log = tmp_path / "out", random.Random(times), tmp_path / "log.txt"
    for number in range(times):
        said = tmp_path / f"said-{number}.txt"
        child = start_command([*words, "--output", str(out)], said, main, fresh=fresh)
        aim = progress(out) + dice.choice([1, 2])
        while progress(out) < aim:
            assert os.waitpid(child, os.WNOHANG) == (0, 0), said.read_text()
            time.sleep(0.005)
        time.sleep(dice.uniform(0, 0.05))
        os.kill(child, signal.SIGINT)
        assert ended(child) == 130, said.read_text()
        text = said.read_text()
        assert "Traceback" not in text and text.splitlines()[-1].endswith("the same command goes on from here"), text
        assert not list(out.rglob("*.part-*"))
    assert ended(start_command([*words, "--output", str(out)], log, main)) == 0
    assert left(out) == whole


PLACES = {
    sample.main: [".lock.json", "protocol.json", "000002-*.png", "000020-*.png", "sheet-001.png"],
    evaluate.main: [".lock.json", "evaluation.md", "evaluation.html", "evaluation.json"],
    label.main: ["label.json", "train-00003-*.parquet", "summary.json", "margins.png", "pairs.html", "README.md"],
}


def test_killed_while_a_file_is_written_nothing_is_left_of_it(once, tmp_path):
    """At the last moment before each kind of file is there: in the end no half one is left."""
    main, words, _, left, whole = once
    out, log, replace = tmp_path / "out", tmp_path / "log.txt", common_files.replace
    for pattern in PLACES[main]:

        def killing(source, target, pattern=pattern):
            if target.match(pattern):
                os.kill(os.getpid(), signal.SIGKILL)
            return replace(source, target)

        def spoiled(given, killing=killing):
            common_files.replace = killing
            return main(given)

        assert ended(start_command([*words, "--output", str(out)], log, spoiled)) == -signal.SIGKILL, pattern
        assert list(out.rglob(".*.part-*")), pattern
    assert ended(start_command([*words, "--output", str(out)], log, main)) == 0, log.read_text()[-3000:]
    assert left(out) == whole and not list(out.rglob("*.part-*"))
