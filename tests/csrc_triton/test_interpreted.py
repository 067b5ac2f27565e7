"""Every kernel in Triton's interpreter: one subprocess runs the selected `interpreted/check_*.py`, one result per file
here.
"""

import os
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

HERE = Path(__file__).parent
STEMS = sorted(path.stem.removeprefix("check_") for path in (HERE / "interpreted").glob("check_*.py"))


def run(stems: list[str], marker: str, report: Path) -> dict[str, tuple[int, str]]:
    """stem -> (number of tests, what failed), from one pytest process under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    files = [str(HERE / "interpreted" / f"check_{stem}.py") for stem in stems]
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-m",
        marker,
        f"--junitxml={report}",
        "-p",
        "no:cacheprovider",
        *files,
    ]
    process = subprocess.run(command, check=False, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    assert process.returncode in (0, 1, 5) and report.exists(), process.stdout[-4000:] + process.stderr[-4000:]
    results = {}
    for stem in stems:
        cases = [
            c for c in ElementTree.parse(report).iter("testcase") if c.get("classname", "").endswith(f"check_{stem}")
        ]
        bad = [
            (c.get("name"), (fault.text or "")[-2000:])
            for c in cases
            for fault in c
            if fault.tag in ("failure", "error")
        ]
        results[stem] = (len(cases), "\n\n".join(f"{name}\n{text}" for name, text in bad))
    return results


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """marker -> results of the stems that this run selected, each subprocess started once."""
    done = {}

    def get(test, marker: str) -> dict[str, tuple[int, str]]:
        if marker not in done:
            chosen = [
                i.callspec.params["stem"] for i in request.session.items if getattr(i, "originalname", "") == test
            ]
            done[marker] = run(chosen, marker, tmp_path_factory.mktemp("interpreted") / "report.xml")
        return done[marker]

    return get


@pytest.mark.parametrize("stem", STEMS)
def test_interpreted(stem, outcomes):
    count, failures = outcomes("test_interpreted", "not slow")[stem]
    assert not failures, failures
    assert count > 0, f"check_{stem}.py has no quick test"


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_interpreted_full_grid(stem, outcomes):
    _, failures = outcomes("test_interpreted_full_grid", "slow")[stem]
    assert not failures, failures
