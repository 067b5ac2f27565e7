"""The checks of a section in a process of its own, so that nothing that a check does ends the others.

A check that raises is a row with its reason, and the next one goes on. One that hangs, is killed or leaves the GPU unusable
takes its process along: that is a row too, and a new process goes on behind it. Rows come one JSON object a line, each as
soon as it is known. The parent never touches the GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from benchmarks.checks import Check, Row, said
from benchmarks.sections import begin

START = 60.0  # seconds until a process must have begun its first check
LEAST = 5.0  # seconds below which no process is started


# ------------------------------------------------------------------------------------------------------------------- the child


def work_off(checks: Sequence[Check], first: int, tell: Callable[[Row], None]) -> None:
    """Makes the checks from number `first` on and tells what becomes of them.

    Messages: {"begin", "name", "limit"} before a check, {"row"}, {"end"} after it, and {"again"}, the number to go on with
    in a new process.
    """
    for index in range(first, len(checks)):
        check = checks[index]
        if check.alone and index > first:
            tell({"again": index})
            return
        tell({"begin": index, "name": check.name, "limit": check.limit})
        try:
            for row in check.work():
                tell({"row": row})
        except Exception as error:
            tell({"row": {"check": check.name, "failed": said(error), "ok": False}})
        tell({"end": index})
        gc.collect()
        if not _usable() or (check.alone and index + 1 < len(checks)):
            tell({"again": index + 1})
            return


def _usable() -> bool:
    """Whether the GPU still answers: after an illegal access it never does again in this process."""
    import torch

    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


def main(argv: list[str] | None = None) -> int:
    """The child's command: messages go to standard output, everything else that is printed to standard error."""
    parser = argparse.ArgumentParser(prog="benchmarks.children", description=__doc__)
    parser.add_argument("section")
    parser.add_argument("--first", type=int, default=0, help="number of the first check")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--seconds", type=float, default=60.0, help="time that all checks have together")
    parser.add_argument("--known", type=Path, help="results.json of the call so far")
    given = parser.parse_args(argv)
    messages = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def tell(message: Row) -> None:
        messages.write(json.dumps(message) + "\n")
        messages.flush()

    known = json.loads(given.known.read_text("utf-8")) if given.known and given.known.exists() else {}
    checks, about = begin(given.section, given.smoke, given.seconds, known)
    tell({"about": about})
    work_off(checks, given.first, tell)
    return 0


# ------------------------------------------------------------------------------------------------------------------ the parent


class _Child:
    """A process whose lines can be waited for, and the last words that it printed."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed by `end`
        self.process = subprocess.Popen(
            list(command), stdout=subprocess.PIPE, stderr=self.errors, stdin=subprocess.DEVNULL, env=dict(environment),
            start_new_session=True,
        )  # fmt: skip
        self.lines: queue.Queue[bytes | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def message(self, seconds: float) -> Row | None:
        """The next message; None at the end. Raises queue.Empty after `seconds`."""
        line = self.lines.get(timeout=max(0.0, seconds))
        return None if line is None else json.loads(line)

    def ended(self) -> str:
        """How it ended, in words; "" where it came to its end."""
        code = self.process.wait()
        if code == 0:
            return ""
        self.errors.seek(0)
        words = [line for line in self.errors.read().decode(errors="replace").splitlines() if line.strip()]
        how = f"killed by signal {-code}" if code < 0 else f"ended with code {code}"
        memory = " (out of host memory, or by hand)" if code == -signal.SIGTERM or code == -9 else ""
        return f"{how}{memory}" + (f": {words[-1][:300]}" if words else "")

    def end(self) -> None:
        """Ends it and what it started."""
        if hasattr(os, "killpg"):
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.errors.close()


@contextmanager
def _started(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[_Child]:
    child = _Child(command, environment)
    try:
        yield child
    finally:
        child.end()


def command_of(section: str, smoke: bool, known: Path) -> list[str]:
    """The command of a section's child. known: the file of the results so far, which need not be there yet."""
    words = [sys.executable, "-m", "benchmarks.children", section, "--known", str(known)]
    return [*words, *(["--smoke"] if smoke else [])]


def rows_of(
    command: Sequence[str], seconds: float, environment: Mapping[str, str], heard: Callable[[Row], None]
) -> Iterator[Row]:
    """The rows of all checks of a section, in at most so many seconds; each end before its time is a row.

    command: of a child, to which --first and --seconds are added. heard: is told what the child says of its device.
    """
    until, first = time.monotonic() + seconds, 0
    while (left := until - time.monotonic()) >= LEAST:
        more = ["--first", str(first), "--seconds", str(left)]
        with _started([*command, *more], environment) as child:
            again = yield from _followed(child, until, first, heard)
        if again is None:
            return
        first = again
    yield {"check": f"from check {first} on", "failed": "not tried: the time is used up"}


def _followed(child: _Child, until: float, first: int, heard: Callable[[Row], None]) -> Iterator[Row]:
    """Rows of one child; returns the number of the check to go on with, None at the end."""
    name, limit, number = "the start", START, first - 1
    began, running = time.monotonic(), True
    while True:
        end = min(until, began + limit)
        try:
            message = child.message(end - time.monotonic())
        except queue.Empty:
            used = "the section's time is used up" if end == until else f"longer than its {limit:.0f} s"
            yield {"check": name, "failed": f"stopped: {used}", "ok": False}
            return None if number < first else number + 1
        if message is None:
            how = child.ended()
            if not how and not running:
                return None
            yield {"check": name, "failed": how or "ended without a word", "ok": False}
            return None if number < first else number + 1
        if "about" in message:
            heard(message["about"])
            running = False
        elif "begin" in message:
            number, name, limit = message["begin"], message["name"], message["limit"]
            began, running = time.monotonic(), True
        elif "row" in message:
            yield message["row"]
        elif "end" in message:
            running = False
        elif "again" in message:
            return message["again"]


if __name__ == "__main__":
    sys.exit(main())
