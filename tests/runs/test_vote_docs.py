"""docs/vote.md: its commands, as they stand there, from folders of images to preference pairs."""

import re
import shlex
from pathlib import Path

import pytest

from dpo import evaluate, vote
from dpo.data.sources import open_source
from dpo.settings.config import Data
from dpo.voting import study
from dpo.voting.answers import Journal
from tests.help import simulated
from tests.help.votes import make_folder

ROOT = Path(__file__).parents[2]
MAINS = {"vote": (vote.main, vote.make_parser), "evaluate": (evaluate.main, evaluate.make_parser)}
COMMAND = re.compile(r"^\s*python -m dpo\.(vote|evaluate) (.*?)(?:  +#.*)?$", re.MULTILINE)


def commands(page: str) -> list[tuple[str, list[str]]]:
    """(command, words) of the page's lines of code that are of MAINS."""
    return [(name, shlex.split(words)) for name, words in COMMAND.findall((ROOT / page).read_text(encoding="utf-8"))]


@pytest.mark.parametrize(("page", "least"), [("docs/vote.md", 8), ("README.md", 6)])
def test_their_flags_are_there(page, least):
    found = commands(page)
    assert len(found) >= least
    for name, words in found:
        MAINS[name][1]().parse_args(words)


def test_one_after_the_other(tmp_path, monkeypatch, capsys):
    """On folders of small images in place of those that dpo.sample draws, and simulated people in place of the page."""
    monkeypatch.chdir(tmp_path)
    make_folder(tmp_path / "images" / "base", 12, (200, 30, 30), (64, 64))
    make_folder(tmp_path / "images" / "aligned", 12, (30, 200, 30), (64, 64))
    voted = False
    for name, words in commands("docs/vote.md"):
        if words == ["study"]:  # serves until it is stopped
            continue
        if (tmp_path / "study").is_dir() and not voted:
            declared = study.read(tmp_path / "study")
            with Journal(tmp_path / "study") as journal:
                for answer in simulated.vote(declared, simulated.beta(8, 2), 0, raters=6):
                    journal.add(answer)
            voted = True
        assert MAINS[name][0](words) == 0, (words, capsys.readouterr().err)
    said = capsys.readouterr().out
    assert "assumed: that of Beta(3, 2)" in said and "measured on" in said, "before and after the pilot"
    assert "People prefer aligned to base." in said
    page = (tmp_path / "study" / "votes.html").read_text(encoding="utf-8")
    assert "Which scorer to trust" in page and "tiny-b" in page
    assert len(open_source(Data(data=str(tmp_path / "votes.parquet"), ties="keep", validation_fraction=0.0))) == 12
