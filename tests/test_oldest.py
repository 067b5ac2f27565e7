"""The versions that .ci/run slow tests with are the lowest that setup.py claims."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
APART = {"torch", "triton", "psutil"}  # the first two are one build; psutil is for Windows


def lowest(text: str, between: str) -> dict[str, tuple[int, ...]]:
    """Name and version, without zeros at its end, of every `name<between>version`."""
    found = re.findall(rf'^\s*"?(\w+){between}([\d.]+)', text, re.MULTILINE)
    return {name: tuple(map(int, re.sub(r"(\.0)+$", "", version).split("."))) for name, version in found}


def test_they_are_those_of_setup():
    setup = (ROOT / "setup.py").read_text("utf-8")
    claimed = setup.split("install_requires=[")[1].split("    ],")[0]
    claims = lowest(claimed, ">=")
    for extra in ("vote", "bitsandbytes"):
        claims |= lowest("\n".join(re.findall(rf'"{extra}": \[([^\]]*)', setup)[0].split(", ")), ">=")
    assert len(claims) > 15 and claims.keys() > APART
    tested = lowest((ROOT / ".ci" / "oldest.txt").read_text("utf-8"), "==")
    assert tested == {name: version for name, version in claims.items() if name not in APART}
