"""dpo.vote, from its command line to answers on disk: declared, served, killed, gone on with, and stopped."""

import http.client
import json
import logging
import os
import random
import re
import signal
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest

from dpo import vote
from dpo.voting import export, plan, report, server, study
from dpo.voting.answers import read
from dpo.voting.study import Question, Rule
from tests.help.children import start_command
from tests.help.drawing import QUICK, drawn
from tests.help.votes import answered, make_folder

RED, GREEN = (200, 30, 30), (30, 200, 30)


@pytest.fixture
def sides(tmp_path):
    return [str(make_folder(tmp_path / name, 8, colour)) for name, colour in (("base", RED), ("new", GREEN))]


@pytest.fixture
def command(capsys):
    """Runs `python -m dpo.vote words...` here: exit code, stdout and the lines of stderr."""
    log = logging.getLogger("dpo")
    before = log.handlers[:], log.level, log.propagate

    def run(*words):
        capsys.readouterr()
        try:
            code = vote.main([str(word) for word in words])
        finally:
            log.handlers[:], log.level, log.propagate = before
        said = capsys.readouterr()
        return code, said.out, said.err.splitlines()

    return run


@pytest.fixture(autouse=True)
def no_server_is_left():
    """Ends the servers that a test which failed has left."""
    yield
    for child in Server.children:
        with suppress(ProcessLookupError, ChildProcessError):
            if os.waitpid(child, os.WNOHANG)[0] == 0:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
    Server.children.clear()


class Server:
    """`python -m dpo.vote words...` as a process of its own."""

    children: ClassVar[list[int]] = []

    def __init__(self, said: Path, *words: object) -> None:
        self.said = said
        said.write_text("", "utf-8")
        self.child = start_command([str(word) for word in words], said, vote.main)
        self.children.append(self.child)
        end = time.monotonic() + 120
        while not (found := re.search(r"open http://127\.0\.0\.1:(\d+)/ here", self.text)):
            assert time.monotonic() < end and os.waitpid(self.child, os.WNOHANG)[0] == 0, self.text
            time.sleep(0.05)
        self.port = int(found[1])

    @property
    def text(self):
        return self.said.read_text("utf-8")

    def post(self, what, **said):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request("POST", f"/api/{what}", json.dumps(said), {"Content-Type": "application/json"})
            answer = connection.getresponse()
            return answer.status, json.loads(answer.read())
        finally:
            connection.close()

    def enter(self, name):
        reply = self.post("enter", link="", name=name)[1]
        return {"rater": reply["rater"], "key": reply["key"]}

    def end(self, sign):
        """Sends a signal; the exit code, negative for a signal's death."""
        os.kill(self.child, sign)
        return os.waitstatus_to_exitcode(os.waitpid(self.child, 0)[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the server runs in a forked child")
def test_killed_between_click_and_answer_and_stopped_by_ctrl_c(tmp_path, sides, command, monkeypatch):
    folder, log = tmp_path / "study", tmp_path / "said.txt"
    first = Server(log, *sides, "--output", folder, "--port", 0, "--votes", 1)
    me = first.enter("Anna")
    said = answered(first.post("next", **me)[1], 1)
    assert first.end(signal.SIGKILL) == -signal.SIGKILL  # the click is on its way
    again = Server(log, folder, "--port", first.port)
    status, reply = again.post("answer", **me, **said)
    assert status == 200 and reply["done"] == 1
    assert again.post("answer", **me, **said)[1] == reply and [one.id for one in read(folder)] == [said["id"]]
    with monkeypatch.context() as patched:
        patched.setattr(server, "serve", None)  # it comes to no page
        code, _, lines = command(folder, "--port", 0)
    assert code == 2 and re.fullmatch(
        rf"dpo\.vote: the study {folder} is in use by process {again.child} .*", lines[-1]
    )
    idle = http.client.HTTPConnection("127.0.0.1", again.port, timeout=60)  # a browser keeps its connection
    idle.request("GET", "/")
    idle.getresponse().read()
    began = time.monotonic()
    assert again.end(signal.SIGINT) == 130 and time.monotonic() - began < 20
    idle.close()
    last = again.text.splitlines()[-1]
    assert (
        last.endswith("stopped; every answer is kept, and the same command goes on") and "Traceback" not in again.text
    )
    assert len(read(folder)) == 1 and not list(folder.glob(".*.part-*"))
    third = Server(log, *sides, "--output", folder, "--port", 0, "--votes", 1)  # the same command goes on
    assert "study: 1 of 24 votes are given" in third.text and "image " not in third.text  # nothing is read anew
    assert third.post("next", **me)[1]["done"] == 1
    assert third.end(signal.SIGTERM) == -signal.SIGTERM


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the server runs in a forked child")
def test_killed_at_any_moment_what_was_heard_is_kept(tmp_path, sides):
    folder, log, draw = tmp_path / "study", tmp_path / "said.txt", random.Random(0)
    assert vote.main([*sides, "--output", str(folder), "--declare"]) == 0
    heard, number = [], 0
    for _ in range(5):
        server = Server(log, folder, "--port", 0)
        me = server.enter("Anna")
        threading.Timer(draw.uniform(0.0, 0.25), os.kill, (server.child, signal.SIGKILL)).start()
        try:
            reply = server.post("next", **me)[1]
            while reply["state"] == "question":
                number += 1
                reply = server.post("answer", **me, **answered(reply, number))[1]
                heard.append(f"{number:032x}")
        except (OSError, http.client.HTTPException, ValueError):
            pass
        os.waitpid(server.child, 0)
    kept = [one.id for one in read(folder)]
    assert set(heard) <= set(kept) and len(set(kept)) == len(kept) <= len(heard) + 5
    assert len({(one.item, one.question, one.repeat) for one in read(folder)}) == len(kept) > 0


def test_a_study_is_declared_with_all_that_was_asked_for(tmp_path, sides, command):
    texts = tmp_path / "text.txt"
    texts.write_text("\ufeffRead this.\n", "utf-8")
    folder = tmp_path / "study"
    words = [
        f"old={sides[0]}", f"fresh={sides[1]}", "--output", folder, "--questions", "look=Which looks better?", "Why = not?",
        "--votes", 3, "--no-tie", "--title", "A title", "--instructions", texts, "--notice", texts, "--subset", 5,
        "--checks", "0.1", "--repeats", "0", "--rule", "broken=0.6", "repeats=.5", "--seed", 7, "--declare",
    ]  # fmt: skip
    assert command(*words)[0] == 0
    found = study.read(folder)
    assert found.sides == ("old", "fresh") and (found.votes, found.tie, found.seed, found.repeats) == (3, False, 7, 0.0)
    assert found.questions == (Question("look", "Which looks better?"), Question("q2", "Why = not?"))
    assert (found.title, found.instructions, found.notice) == ("A title", "Read this.", "Read this.")
    assert found.rule == Rule(0.6, 0.5) and sum(item.kind == "vote" for item in found.items) == 5
    assert command(*words)[0] == 0 and study.read(folder) == found
    words[words.index("--votes") + 1] = 4
    code, _, lines = command(*words)
    assert (
        code == 2
        and "declared with --votes '3', not '4': it is fixed since" in lines[-1]
        and study.read(folder) == found
    )


def test_mistakes_are_one_line_each(tmp_path, sides, command):
    (tmp_path / "file.txt").write_text("x", "utf-8")
    assert command(*sides, "--output", tmp_path / "study", "--declare")[0] == 0
    out = ["--output", tmp_path / "other"]
    cases = [
        ([], "nothing to ask about: name two folders of images and --output, or the folder of a study"),
        (sides, r"--output is missing: where the study of .* and its votes shall lie"),
        ([sides[0]], "--output is missing"),
        ([tmp_path / "study", "--votes", 3], "is a study, and fixed since it was declared: leave out --votes"),
        ([tmp_path / "study", "--no-tie"], "leave out --tie"),
        ([*sides, "--output", tmp_path / "file.txt"], "a file is there; name a folder"),
        ([*sides, "--output", sides[0]], "holds other files"),
        ([*sides, *out, "--votes", 0], "--votes: 0 is below 1"),
        ([*sides, *out, "--repeats", "0.7"], "expected a share from 0 to 0.5"),
        ([*sides, *out, "--repeats", "nan"], "expected a share from 0 to 0.5"),
        ([*sides, *out, "--repeats", "x"], "argument --repeats: invalid number value: 'x'"),
        ([*sides, *out, "--rule", "broken=2"], "--rule 'broken=2': expected broken=SHARE"),
        ([*sides, *out, "--rule", "votes=0.1"], "--rule 'votes=0.1': expected broken=SHARE"),
        ([*sides, *out, "--questions", "a=A?", "a=B?"], "two are called a"),
        ([*sides, *out, "--questions", "a= "], "--questions ' ': expected a text"),
        ([*sides, *out, "--notice", tmp_path / "none.txt"], r"--notice .*none\.txt: cannot be read"),
        ([*sides, *out, "--study", "mine"], "invalid choice: 'mine'"),
        (["=x", sides[0], *out], "'=x': expected a model or a folder, or NAME=MODEL"),
        (["--plan", "--report"], "--plan and --report: give one"),
        (["--plan", "--prompts", 10, "--port", 3], "--port means nothing to --plan"),
        (["--plan", "--prompts", 1_000_000_000], "a plan of 1,000,000,000 prompts: give 1 to 100,000"),
        ([tmp_path / "study", "--report", "--question", "x"], "--question is of --export"),
        ([tmp_path / "study", "--scores", "foo"], "--scores is of --report"),
        ([*sides, *out, "--layout", "chosen-rejected"], "--layout is of --export"),
        ([*sides, *out, "--budget", 3], "--budget is of --plan"),
        ([tmp_path / "study", "--export", tmp_path / "v.csv"], "name a .parquet file, or a folder"),
        ([tmp_path / "nosuch"], "nosuch: no such folder"),
        (["none", sides[0], *out], "none: no folder is there"),
        ([*sides, "--report"], "--report takes the folder of one study"),
        ([*sides, "--export", "x"], "--export takes the folder of one study"),
        ([*sides, "--plan"], "--plan takes no more than the folder of a pilot"),
        ([tmp_path / "study", "--host", "192.0.2.1"], "cannot serve at 192.0.2.1 port 8765"),
        ([tmp_path / "study", "--raters", " "], "--raters ' ': a name has"),
    ]
    for words, line in cases:
        code, out_, lines = command(*words)
        assert code == 2 and out_ == "", words
        said = [one for one in lines if one.startswith("dpo.vote: ")]
        assert len(said) == 1 and re.search(line, said[0]), (words, lines)
    assert not (tmp_path / "other").exists(), "a refusal leaves no folder"


def test_a_port_in_use_is_one_line(tmp_path, sides, command):
    assert command(*sides, "--output", tmp_path / "study", "--declare")[0] == 0
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, lines = command(tmp_path / "study", "--port", taken.getsockname()[1])
    assert code == 2 and "choose another --port (0 takes a free one) or --host" in lines[-1]


def test_plan_report_and_export_are_handed_what_was_asked_for(tmp_path, command, monkeypatch):
    calls = []
    monkeypatch.setattr(plan, "lines", lambda **given: calls.append(given) or ["one", "two"])
    monkeypatch.setattr(
        report,
        "make",
        lambda folder, scores: calls.append((folder, scores)) or report.Made(folder / "votes.html", ["said"]),
    )
    monkeypatch.setattr(export, "write", lambda *given, layout: calls.append((*given, layout)) or ["written"])
    assert command("--plan", "--prompts", 200, "--budget", 999, "--share", 0.55, "--agreement", 0.3)[:2] == (
        0,
        "one\ntwo\n",
    )
    assert command("--plan", tmp_path, "--votes", 3)[0] == 0
    assert command(tmp_path, "--report", "--scores", "a", "b=c")[:2] == (0, "said\n")
    code, _, lines = command(tmp_path, "--export", "x.parquet", "--question", "q", "--layout", "chosen-rejected")
    assert code == 0 and "written" in lines[-1]
    assert calls == [
        {"prompts": 200, "votes": 5, "budget": 999, "share": 0.55, "agreement": 0.3, "pilot": None},
        {"prompts": None, "votes": 3, "budget": None, "share": 0.6, "agreement": None, "pilot": tmp_path},
        (tmp_path, ["a", "b=c"]),
        (tmp_path, Path("x.parquet"), "q", "chosen-rejected"),
    ]


@pytest.mark.long
def test_folders_that_dpo_sample_drew_can_be_asked_about(tmp_path, command, capsys):
    places = [tmp_path / name for name in ("weak", "strong")]
    for place, guidance in zip(places, ("1", "3"), strict=True):
        code, said = drawn(
            capsys,
            "embedded",
            "--prompts",
            "a red frog",
            "a blue cup",
            *QUICK,
            "--guidance",
            guidance,
            "--output",
            place,
        )
        assert code == 0, said
    assert command(*places, "--output", tmp_path / "study", "--declare")[0] == 0
    found = study.read(tmp_path / "study")
    assert found.sides == ("weak", "strong") and sum(item.kind == "vote" for item in found.items) == 2
    assert "weak and strong were drawn by different protocols (guidance: 1.0 and 3.0)" in found.note


def test_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        vote.make_parser().parse_args(["--help"])
    said = capsys.readouterr().out
    assert all(
        flag in said
        for flag in ("--output", "--study", "--plan", "--report", "--export", "--raters", "--host", "--rule")
    )
