"""Every kernel in Triton's interpreter: `interpreted/check_STEM.py`, in processes of their own.

Triton decides on import whether kernels are interpreted. The quick tests share a process: a start costs more than most
of the files.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
STEMS = sorted(path.stem.removeprefix("check_") for path in (HERE / "interpreted").glob("check_*.py"))


def run(stems: list[str], marker: str) -> tuple[int, str]:
    """(pytest's exit code, what it printed) of these files under the interpreter."""
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": ""}
    files = [str(HERE / "interpreted" / f"check_{stem}.py") for stem in stems]
    command = [sys.executable, "-m", "pytest", "-v", "-m", marker, "-p", "no:cacheprovider", *files]
    ended = subprocess.run(command, check=False, env=environment, cwd=HERE.parents[1], capture_output=True, text=True)
    return ended.returncode, ended.stdout + ended.stderr[-4000:]


def test_interpreted():
    code, said = run(STEMS, "not slow")
    assert code == 0, said[-10000:]
    assert [stem for stem in STEMS if f"check_{stem}.py ." not in said] == [], "files without a quick test"


@pytest.mark.slow
@pytest.mark.parametrize("stem", STEMS)
def test_interpreted_full_grid(stem):
    code, said = run([stem], "slow")
    assert code in (0, 5), said[-10000:]
