"""A machine that is not Linux, as far as Linux can play it: the core of the suite without triton and POSIX's own calls.

    python -m tests.help.elsewhere [pytest's options]          runs CORE

Every process, the test's own and those that it starts, loads a sitecustomize that calls `hide`. There is no triton, as on
macOS; no resource, termios, fork, SIGALRM or sched_getaffinity, as on Windows; folders refuse fsync, as on CIFS; text has
no default encoding but ASCII, so that a file opened without one fails; workers are spawned.
"""

from __future__ import annotations

import builtins
import errno
import os
import signal
import stat
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
CORE = (
    "tests/runs/test_elsewhere.py",
    "tests/runs/test_old_files.py",  # resume
    "tests/dpo/common/test_command.py",
    "tests/dpo/data/test_sources.py",
    "tests/dpo/data/test_tables.py",
    "tests/dpo/data/test_loader.py::test_workers_change_nothing",  # spawned
    "tests/dpo/pages/test_report.py::test_one_line_and_no_line_make_a_page_too",
    "tests/dpo/test_prepare.py::test_the_command_says_when_it_is_done_and_verifies",
    "tests/dpo/training/test_loop.py",
    "tests/dpo/voting/test_answers.py",
    "tests/dpo/voting/test_server.py::test_a_rater_comes_in_sees_and_answers",
    "tests/dpo/test_vote.py::test_mistakes_are_one_line_each",
)
POSIX = ("resource", "termios", "fcntl", "pwd", "grp", "pty", "tty")
SITE = "from tests.help.elsewhere import hide\nhide()\n"


def hide() -> None:
    """Takes away what other machines do not have. To be called before anything is imported."""
    sys.modules["triton"] = None  # type: ignore[assignment]  # importing it raises ModuleNotFoundError
    load = builtins.__import__

    def imported(name, globals=None, *rest, **kwargs):
        by = (globals or {}).get("__name__", "").split(".")[0]
        if name in POSIX and by in ("dpo", "csrc_triton", "benchmarks"):  # other libraries know where they run
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return load(name, globals, *rest, **kwargs)

    builtins.__import__ = imported
    for place, name in ((os, "sched_getaffinity"), (os, "fork"), (signal, "SIGALRM"), (signal, "alarm")):
        delattr(place, name)
    fsync = os.fsync

    def refused(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        fsync(descriptor)

    os.fsync = refused


def environment(folder: Path) -> dict[str, str]:
    """The environment of a process of that machine; `folder` is an empty one for its sitecustomize."""
    (folder / "sitecustomize.py").write_text(SITE, "utf-8")
    path = os.pathsep.join([str(folder), str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    return {**os.environ, **plain, "PYTHONPATH": path}


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="dpo-elsewhere-") as folder:
        command = [sys.executable, "-m", "pytest", "-m", "not slow", *CORE, *arguments]
        return subprocess.run(command, check=False, cwd=ROOT, env=environment(Path(folder))).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
