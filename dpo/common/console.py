"""What a person sees while a run goes on: one progress line on a terminal, one log line per interval elsewhere."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.live import Live
from rich.logging import RichHandler
from rich.text import Text

from dpo.common.words import printable

log = logging.getLogger("dpo")

BAR_WIDTH = 16
PLAIN_LINES = 100
SILENCE = 30.0  # seconds without a line, where there is no terminal, after which a part of the work says how far it is

_console = Console(stderr=True)
_open: list[Progress] = []  # those that are shown now, the innermost last


def setup(level: int | str = logging.INFO, console: Console | None = None) -> Console:
    """Send the library's log to stderr: coloured on a terminal, plain lines with the time elsewhere. Call it once."""
    console = console or _console
    handler: logging.Handler
    if console.is_terminal:
        handler = RichHandler(
            console=console, show_path=False, log_time_format="%H:%M:%S", rich_tracebacks=False, markup=False
        )
        handler.setFormatter(_Printable("%(message)s"))
    else:
        handler = logging.StreamHandler(console.file)
        handler.setFormatter(_Printable("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    for old in list(log.handlers):
        log.removeHandler(old)
    log.addHandler(handler)
    log.setLevel(level.upper() if isinstance(level, str) else level)
    log.propagate = False
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it logs advice when any library imports it
    return console


class _Printable(logging.Formatter):
    """Lines for a terminal, whatever the data says."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


class Progress:
    """The progress of a run, used as a context manager around the training loop.

    On a terminal one line is redrawn in place. Elsewhere (CI, nohup) a log line comes every `log_every` updates and
    after the last one, at most PLAIN_LINES in a run. `fields` turns an update's figures into words; `unit` is
    what is counted. What is done between updates as a `part` shows on the same line, and its time is not taken for theirs.
    """

    def __init__(
        self,
        total: int,
        fields: Callable[[Mapping[str, Any]], list[str]],
        start: int = 0,
        log_every: int = 10,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
        unit: str = "step",
    ) -> None:
        self.total, self.start, self._fields, self._unit = total, start, fields, unit
        self._line_every = max(1, log_every, -(-total // PLAIN_LINES))
        self._last_line = start
        self._clock = clock
        self._begun = clock()
        self._step = start
        self._aside = 0.0  # seconds in parts
        console = console or _console
        self._live = Live(console=console, auto_refresh=False, transient=False) if console.is_terminal else None

    def __enter__(self) -> Self:
        self._begun = self._clock()
        if self._live is not None:
            self._live.start()
        _open.append(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        _open.remove(self)
        if self._live is not None:
            with suppress(OSError):  # the terminal was closed
                self._live.stop()

    def update(self, step: int, metrics: Mapping[str, Any]) -> None:
        """`step` updates are done and the last one gave these metrics."""
        self._step = step
        if self._live is not None:
            _redraw(self._live, self._styled(step, [*self._fields(metrics), self._time_left(step)]))
        elif step // self._line_every > self._last_line // self._line_every or step == self.total:
            self._last_line = step
            log.info(
                "%s", "  ".join([f"{self._unit} {step}/{self.total}", *self._fields(metrics), self._time_left(step)])
            )

    def _styled(self, step: int, fields: list[str]) -> Text:
        done = BAR_WIDTH * step // max(1, self.total)
        line = Text(no_wrap=True, overflow="ellipsis")
        line.append("━" * done, style="green").append("━" * (BAR_WIDTH - done), style="bright_black")
        line.append(f" {step}/{self.total}", style="bold")
        for field in fields:
            line.append("  ").append(field)
        return line

    def _time_left(self, step: int) -> str:
        return _time_left(self._clock() - self._begun - self._aside, step - self.start, self.total - step)


@contextmanager
def part(
    what: str, total: int | None, console: Console | None = None, clock: Callable[[], float] = time.monotonic
) -> Iterator[Callable[[int], None]]:
    """Inside the block, how to say that so much of `total` is done of `what`, a part of the work that may take long.

    total: None where it is not known.
    On a terminal a line, which goes at the end, or the line of the Progress around it; elsewhere a log line after each
    SILENCE seconds. Nothing where the log shows no such lines, as in all processes of a run but the first.
    """
    if not log.isEnabledFor(logging.INFO):
        yield lambda done: None
        return
    console, outer = console or _console, _open[-1] if _open else None
    alone = outer is None and console.is_terminal
    own = Live(console=console, auto_refresh=False, transient=True) if alone else None
    begun = last = clock()

    def told(done: int) -> None:
        nonlocal last
        now = clock()
        fields = [f"{what} {done}"]
        if total is not None:
            fields = [f"{what} {done}/{total}", _time_left(now - begun, done, total - done)]
        if outer is not None and outer._live is not None:
            _redraw(outer._live, outer._styled(outer._step, fields))
        elif own is not None:
            _redraw(own, Text("  ".join(fields), no_wrap=True, overflow="ellipsis"))
        elif now - last >= SILENCE:
            last = now
            log.info("%s", "  ".join(fields))

    try:
        if own is not None:
            own.start()
        yield told
    finally:
        if own is not None:
            with suppress(OSError):
                own.stop()
        if outer is not None:
            outer._aside += clock() - begun


def _redraw(live: Live, line: Text) -> None:
    with suppress(OSError):  # the terminal was closed: SIGHUP, or nohup, says whether the run goes on
        live.update(line, refresh=True)


def _time_left(seconds: float, done: int, left: int) -> str:
    return "ETA ?" if done <= 0 else "ETA " + duration(seconds / done * left)


def duration(seconds: float) -> str:
    """Seconds as a person says them: 42s, 3m 20s, 5h 07m, 2d 04h."""
    seconds = round(max(0.0, seconds))
    if seconds < 60:
        return f"{seconds}s"
    if seconds < 3600:
        return f"{seconds // 60}m {seconds % 60:02d}s"
    if seconds < 86400:
        return f"{seconds // 3600}h {seconds % 3600 // 60:02d}m"
    return f"{seconds // 86400}d {seconds % 86400 // 3600:02d}h"
