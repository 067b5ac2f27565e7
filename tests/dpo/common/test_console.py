"""dpo.console: one line on a terminal, few plain lines elsewhere."""

import io
import logging

import pytest
from rich.console import Console

from dpo.common.console import Progress, duration, part, setup
from dpo.pages.figures import progress_fields

METRICS = {
    "loss": 0.65432,
    "implicit_accuracy": 0.625,
    "margin_mean": 0.0871,
    "pairs_per_s": 12.34,
    "mfu": 0.312,
    "peak_memory_gib": 21.25,
}


@pytest.fixture
def library_log():
    """The library's logger, put back as it was."""
    log = logging.getLogger("dpo")
    before = (list(log.handlers), log.level, log.propagate)
    yield log
    log.handlers[:], level, propagate = before
    log.setLevel(level)
    log.propagate = propagate


def play(total, terminal, start=0, log_every=1, width=160):
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None, legacy_windows=False)
    setup("info", console)
    ticks = iter(range(0, 100000, 2))
    with Progress(total, progress_fields, start, log_every, console, clock=lambda: next(ticks)) as progress:
        for step in range(start + 1, total + 1):
            progress.update(step, METRICS)
    return out.getvalue()


def test_terminal_line_has_all_that_was_promised(library_log):
    text = play(3, terminal=True)
    last = text.split("\r")[-1]
    for field in (
        "3/3",
        "loss 0.6543",
        "acc 0.625",
        "margin +0.087",
        "12.3 pairs/s",
        "MFU 31.2%",
        "21.2 GiB",
        "ETA 0s",
    ):
        assert field in last
    assert text.count("\n") <= 1


def test_terminal_line_never_wraps(library_log):
    assert play(3, terminal=True, width=60).count("\n") <= 1


def test_plain_lines_at_the_interval_and_at_the_end(library_log):
    lines = play(25, terminal=False, log_every=10).splitlines()
    assert [line.split("step ")[1].split("  ")[0] for line in lines] == ["10/25", "20/25", "25/25"]
    assert "\x1b" not in "".join(lines) and "INFO" in lines[0] and "loss 0.6543" in lines[0]


def test_a_long_run_writes_about_a_hundred_plain_lines(library_log):
    assert 100 <= len(play(2000, terminal=False).splitlines()) <= 101


def test_time_left_counts_this_process_only(library_log):
    # Two seconds an update, resumed at 90: ten more updates are twenty seconds, however many went before.
    line = play(100, terminal=False, start=90, log_every=1).splitlines()[0]
    assert "step 91/100" in line and "ETA 18s" in line


def test_messages_pass_markup_untouched(library_log):
    out = io.StringIO()
    setup("info", Console(file=out, force_terminal=True, width=120, color_system=None))
    library_log.info("prompt [bold]cat[/bold] of %s", "/tmp/x")
    assert "[bold]cat[/bold]" in out.getvalue()


def test_setup_twice_does_not_double_lines(library_log):
    out = io.StringIO()
    console = Console(file=out, force_terminal=False)
    setup("warning", console)
    setup("warning", console)
    library_log.info("quiet")
    library_log.warning("heard")
    assert out.getvalue().count("heard") == 1 and "quiet" not in out.getvalue()


class Clock:
    """Seconds that pass only where a test says so."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def play_parts(terminal, seconds, around=False, level="info"):
    """Four parts of a work, each of so many seconds; around: between two updates of five seconds of a run of four."""
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=160, color_system=None, legacy_windows=False)
    setup(level, console)

    def parts():
        with part("held-out accuracy", 4, console, clock) as told:
            for done in range(1, 5):
                clock.now += seconds
                told(done)

    if not around:
        parts()
        return out.getvalue()
    with Progress(4, lambda _: ["loss 0.7"], 0, 1, console, clock) as progress:
        for step in (1, 2):
            clock.now += 5
            progress.update(step, {})
            parts()
        clock.now += 5
        progress.update(3, {})
    return out.getvalue()


def test_a_part_that_takes_long_says_how_far_it_is(library_log):
    lines = [line.split("INFO ")[1] for line in play_parts(terminal=False, seconds=20).splitlines()]
    assert lines == ["held-out accuracy 2/4  ETA 40s", "held-out accuracy 4/4  ETA 0s"]  # after 30 s without a line
    assert play_parts(terminal=False, seconds=1) == ""
    assert "held-out accuracy 1/4  ETA 1m 00s" in play_parts(terminal=True, seconds=20)


def test_a_part_of_unknown_length_says_what_is_done(library_log):
    out, clock = io.StringIO(), Clock()
    setup("info", Console(file=out, force_terminal=False))
    with part("held-out pairs encoded", None, Console(file=out, force_terminal=False), clock) as told:
        clock.now += 31
        told(96)
    assert out.getvalue().rstrip().endswith("INFO held-out pairs encoded 96")


@pytest.mark.parametrize("terminal", [True, False])
def test_a_part_between_updates_is_on_their_line_and_no_time_of_theirs(library_log, terminal):
    text = play_parts(terminal, seconds=100, around=True)
    shown = text.split("\r") if terminal else text.splitlines()
    third = [line for line in shown if "loss 0.7" in line and "3/4" in line][-1]
    assert "ETA 5s" in third  # one update of five seconds is left, not of a hundred
    assert any("held-out accuracy 2/4" in line and ("1/4" in line or not terminal) for line in shown)
    assert not terminal or text.count("\n") <= 1


def test_a_part_is_not_shown_by_processes_that_log_no_such_lines(library_log):
    assert play_parts(terminal=True, seconds=20, level="error") == ""


@pytest.mark.parametrize(
    ("seconds", "said"), [(0, "0s"), (59.6, "1m 00s"), (200, "3m 20s"), (18420, "5h 07m"), (187200, "2d 04h")]
)
def test_duration(seconds, said):
    assert duration(seconds) == said


@pytest.mark.parametrize("terminal", [True, False])
def test_what_data_says_does_not_drive_the_terminal(terminal, library_log):
    stream = io.StringIO()
    setup(console=Console(file=stream, force_terminal=terminal, width=200, color_system=None))
    library_log.warning("image %s", "a\x1b[2J\x07\u202e.jpg")
    assert "image a\\x1b[2J\\x07\\u202e.jpg" in stream.getvalue()
    assert "\x1b[2J" not in stream.getvalue() and "\x07" not in stream.getvalue()
