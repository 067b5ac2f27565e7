"""The loop of docs/label.md, draw, label, train, twice: its own commands on the embedded world, cut short."""

import json
import re
import shlex
from importlib import import_module
from pathlib import Path

import pytest

DOCS = Path(__file__).parents[2] / "docs" / "label.md"
SHORT = {  # what is added to each command: the last of two flags counts
    "dpo.label": "--steps 2 --subset 12 --device cpu",
    "dpo.train": "--steps 2 --no-judge --no-samples --validate-every 0 --device cpu",
    "dpo.evaluate": "--steps 2 --subset 6 --device cpu",
}


def commands():
    """(command, its words) of the loop, with its variables filled in."""
    block = re.search(r"## In rounds.*?```bash\n(.*?)```", DOCS.read_text("utf-8"), re.DOTALL)[1]
    variables = dict(re.findall(r'^(\w+)="(.*)"$', block, re.MULTILINE))
    for line in block.replace("\\\n", " ").splitlines():
        if line.startswith("python -m "):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            _, _, command, *words = shlex.split(line)
            yield command, words


@pytest.mark.slow
def test_the_loop_of_the_docs_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    found = list(commands())
    assert [command for command, _ in found] == ["dpo.label", "dpo.train"] * 2 + ["dpo.evaluate"]
    for command, words in found:
        code = import_module(command).main([*words, *SHORT[command].split()])
        assert code == 0, (command, words, capsys.readouterr().err[-2000:])
    said = capsys.readouterr().err
    assert "36 pairs of 12 captions labelled by tiny-a" in said, "three of each prompt, twice"
    evaluation = json.loads((tmp_path / "rounds" / "evaluation" / "evaluation.json").read_text())
    assert [side["name"] for side in evaluation["sides"]] == ["start", "run-1", "run-2"]
    assert not any("tiny-b labelled" in line for line in evaluation["warnings"])
