"""Every benchmark that is a command starts, and says what it does."""

from importlib import import_module
from pathlib import Path

import pytest

import benchmarks

FOLDER = Path(benchmarks.__file__).parent
COMMANDS = sorted(path.stem for path in FOLDER.glob("*.py") if "__main__" in path.read_text("utf-8"))


@pytest.mark.parametrize("name", COMMANDS)
def test_help(name, capsys):
    with pytest.raises(SystemExit) as ended:
        import_module(f"benchmarks.{name}").main(["--help"])
    assert ended.value.code == 0 and f"benchmarks.{name}" in capsys.readouterr().out


def test_the_room_lists_its_commands():
    assert [name for name in COMMANDS if f"python -m benchmarks.{name}" not in (benchmarks.__doc__ or "")] == []
