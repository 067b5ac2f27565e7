"""dpo.common.command: one line for a mistake, exit codes, and no heavy import before the command line is known to be
good.
"""

import argparse
import logging
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from dpo.common.command import GOES_ON, INTERRUPTED, MISTAKE, Parser, run, shard_of
from dpo.common.errors import UserError

COMMANDS = {
    name: f"dpo.{name}"
    for name in (
        "train",
        "prepare",
        "sweep",
        "report",
        "sample",
        "evaluate",
        "vote",
        "label",
        "plan",
        "replay",
        "export",
        "extract",
        "pairs",
    )
}


def raising(error):
    def work():
        raise error

    return work


def test_the_exit_code_is_the_works_own(capsys):
    assert [run("dpo.x", lambda code=code: code) for code in (0, 1, 130)] == [0, 1, 130]
    assert capsys.readouterr() == ("", "")


def test_a_mistake_is_one_line_on_stderr(capsys):
    assert run("dpo.x", raising(UserError("no such folder: name another"))) == MISTAKE == 2
    assert capsys.readouterr() == ("", "dpo.x: no such folder: name another\n")


def test_an_interruption_is_said_in_the_commands_words(capsys, caplog, monkeypatch):
    assert run("dpo.x", raising(KeyboardInterrupt())) == INTERRUPTED == 130
    assert capsys.readouterr().err == "dpo.x: interrupted\n"
    log = logging.getLogger("dpo")
    monkeypatch.setattr(log, "handlers", [])  # whatever other tests have put there
    monkeypatch.setattr(log, "propagate", True)
    assert run("dpo.x", raising(KeyboardInterrupt()), GOES_ON) == 130
    assert caplog.messages == [GOES_ON] and "interrupted" not in capsys.readouterr().err


def test_a_fault_of_ours_is_one_line_and_its_traceback_a_file(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert run("dpo.x", lambda: 1 // 0) == 1
    line = capsys.readouterr().err
    assert line.startswith("dpo.x: unexpected ZeroDivisionError: ") and line.count("\n") == 1
    (kept,) = tmp_path.iterdir()
    assert line.endswith(f"{kept}\n") and "1 // 0" in kept.read_text() and "Traceback" in kept.read_text()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    assert run("dpo.x", lambda: 1 // 0) == 1 and "could not be kept" in capsys.readouterr().err


def test_argparse_raises_instead_of_exiting():
    parser = Parser(prog="x")
    parser.add_argument("--number", type=int)
    with pytest.raises(UserError, match="invalid int value"):
        parser.parse_args(["--number", "many"])
    assert isinstance(parser, argparse.ArgumentParser)


@pytest.mark.long
@pytest.mark.parametrize("module", COMMANDS.values())
def test_help_of_every_command_starts_without_torch(module):
    code = f"import sys\nfrom {module} import main\ntry:\n    main(['--help'])\nexcept SystemExit as end:\n    assert end.code == 0\n"
    code += "heavy = {'torch', 'numpy', 'matplotlib', 'diffusers'} & set(sys.modules)\nassert not heavy, heavy"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage" in done.stdout or "python -m" in done.stdout


def without_packages(*words: str) -> subprocess.CompletedProcess[str]:
    """Python with these words, where nothing is installed beside Python itself."""
    alone = {"PYTHONPATH": str(Path(__file__).parents[3]), "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run([sys.executable, "-S", *words], capture_output=True, text=True, check=False, env=alone)


def test_a_package_that_is_not_installed_is_one_line():
    imported = without_packages("-c", f"import {', '.join(COMMANDS.values())}")
    assert imported.returncode == 0, imported.stderr
    done = without_packages("-m", "dpo.train")
    assert done.returncode == MISTAKE and done.stderr.count("\n") == 1 and done.stdout == ""
    words = f"is not installed for {sys.executable}: where the source is, run {sys.executable} -m pip install -e . "
    assert done.stderr.startswith("dpo.train: ") and words in done.stderr


def test_every_command_is_a_console_script():
    text = (Path(__file__).parents[3] / "setup.py").read_text("utf-8")
    assert re.findall(r'"dpo-(\w+) = (dpo\.\w+):main"', text) == list(COMMANDS.items())


@pytest.mark.parametrize("text", ["4/4", "x", "1/0", "-1/2", ""])
def test_a_shard_is_one_of_so_many(text):
    with pytest.raises(UserError, match="expected I/N"):
        shard_of(text)


def test_a_shard_comes_from_the_flag_else_from_torchrun(monkeypatch):
    assert shard_of(None) == (0, 1) and shard_of("2/3") == (2, 3)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert shard_of(None) == (1, 4) and shard_of("2/3") == (2, 3)


def test_a_mistakes_line_does_not_drive_the_terminal(capsys):
    assert run("dpo.x", raising(UserError("column \x1b]0;owned\x07 of a.csv"))) == MISTAKE
    assert capsys.readouterr().err == "dpo.x: column \\x1b]0;owned\\x07 of a.csv\n"
