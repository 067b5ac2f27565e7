"""Every kernel in Triton's interpreter: `interpreted/check_STEM.py`, each in a process of its own.

Triton decides on import whether kernels are interpreted. A process for each file, not one for all: two workers of the
test run then share the files between them, and neither runs them twice.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEMS = sorted(path.stem.removeprefix("check_") for path in (HERE / "interpreted").glob("check_*.py"))


def run(stem: str, marker: str) -> tuple[int, str]:
    """(pytest's exit code, what it printed) of one file under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    file = str(HERE / "interpreted" / f"check_{stem}.py")
    command = [sys.executable, "-m", "pytest", "-q", "-m", marker, "-p", "no:cacheprovider", file]
    ended = subprocess.run(command, check=False, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    return ended.returncode, ended.stdout[-6000:] + ended.stderr[-4000:]


@pytest.mark.parametrize("stem", STEMS)
def test_interpreted(stem):
    code, said = run(stem, "not slow")  # a file without a quick test ends with 5
    assert code == 0, said


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_interpreted_full_grid(stem):
    code, said = run(stem, "slow")
    assert code in (0, 5), said
