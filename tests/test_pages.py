"""What pages say that can be run: the blocks of docs/api.md and the cells of the notebook, as they stand."""

from __future__ import annotations

import ast
import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from PIL import Image

import dpo
from dpo import evaluate, export, extract, label, pairs, plan, prepare, replay, sample, train, vote
from dpo.common import command
from dpo.data.sources import open_source
from dpo.planning import recompute, work
from dpo.planning.cuda import CARDS, GIB, room
from dpo.settings import flags
from dpo.settings.config import Config, change
from tests.help.worlds import make_folders

ROOT = Path(__file__).parents[1]
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"


def blocks(page: str) -> list[str]:
    """The blocks of Python on a page, in order."""
    return BLOCK.findall((ROOT / page).read_text(encoding="utf-8"))


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """An empty working folder with pairs in it; what a run sets for the whole process is set back."""
    threads = torch.get_num_threads()
    monkeypatch.chdir(tmp_path)
    make_folders(tmp_path / "pairs", 6)
    yield tmp_path
    torch.set_num_threads(threads)


def run_one_after_another(parts: list[str]) -> dict:
    """The names that the parts leave, run in one namespace as a reader would."""
    names: dict = {}
    for number, part in enumerate(parts, 1):
        exec(compile(part, f"<part {number}>", "exec"), names)
    return names


@pytest.mark.long
def test_the_blocks_of_the_api_page(elsewhere, capsys):
    parts = blocks("docs/api.md")
    assert len(parts) == 4
    left = run_one_after_another(parts)
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith("Too early to tell. runs") and said[1].startswith("6 a "), said
    assert (elsewhere / "runs" / "first" / "report.html").is_file() and not (elsewhere / "runs" / "loop").exists()
    assert left["terms"].loss.tolist() == [pytest.approx(0.693147, abs=1e-6)] * 2
    assert all(p.grad is not None for p in left["run"].updater.parameters)


def test_the_api_page_lists_every_public_name():
    table = (ROOT / "docs" / "api.md").read_text(encoding="utf-8").split("\n## ")[0]
    assert set(re.findall(r"`(\w+)(?:\([^`]*\))?`", table)) >= dpo.PUBLIC.keys()


def test_an_interrupted_run_does_not_return(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "to_its_end", lambda config, notes: command.INTERRUPTED)
    with pytest.raises(KeyboardInterrupt, match="resume='latest' goes on"):
        dpo.align(output=tmp_path)
    with pytest.raises(dpo.UserError, match="did you mean steps"):
        dpo.align(dpo.Config(), step=3)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_run_takes_its_settings_from_a_recipe(tmp_path, monkeypatch, kind):
    given = []
    monkeypatch.setattr(train, "to_its_end", lambda config, notes: given.append(config) or command.INTERRUPTED)
    (tmp_path / "recipe.toml").write_text("[method]\nbeta = 77.0\n", encoding="utf-8")
    with pytest.raises(KeyboardInterrupt):
        dpo.align(config=kind(tmp_path / "recipe.toml"), output=tmp_path / "run")
    assert (given[0].method.beta, given[0].output.output) == (77.0, str(tmp_path / "run"))


def test_the_tables_of_the_data_page_are_pairs_and_one_of_images_alone(tmp_path):
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    tables = re.findall(r"^```(csv|jsonl)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "images").mkdir()
    for name in sorted(set(re.findall(r"images/(\w+\.png)", text))):
        Image.new("RGB", (8, 8), {"1a.png": "red", "2b.png": "red", "3a.png": "green"}.get(name, "blue")).save(
            tmp_path / "images" / name
        )
    found = {}
    for number, (kind, table) in enumerate(tables):
        (tmp_path / f"{number}.{kind}").write_text(table, encoding="utf-8")
        if table.startswith("prompt,image,label"):
            alone = open_source(change(Config(), data=str(tmp_path / f"{number}.{kind}")).data)
            assert alone.sides == 1 and alone.prob.tolist() == [1, 0] and alone[1].caption == "a cup, half full"
            continue
        read = list(dpo.open_pairs(tmp_path / f"{number}.{kind}", ties="keep"))
        assert [pair.prompt for pair in read[:2]] == ["a fox in the snow", "a cup, half full"]
        assert all(pair.chosen.getpixel((0, 0)) == (255, 0, 0) for pair in read[:2])
        found[number] = [round(pair.p, 3) for pair in read]
    assert found == {0: [1.0, 1.0], 1: [1.0, 1.0], 2: [0.9, 1.0, 0.5]} and len(tables) == 4


LINE = re.compile(r"^\s*(?:srun )?python -m dpo\.(\w+)((?: [^\n]*\\\n)*[^\n]*)$", re.MULTILINE)
OWN = {
    "sample": sample,
    "evaluate": evaluate,
    "label": label,
    "vote": vote,
    "replay": replay,
    "pairs": pairs,
    "export": export,
    "extract": extract,
}  # all their flags are theirs
OVER = {"train": None, "plan": plan, "prepare": prepare}  # those of dpo.train, and theirs


def command_lines() -> list[tuple[str, str, list[str]]]:
    """(page, command, words) of every line of code on a page that runs one; dots and brackets stand for more."""
    found = []
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        for name, words in LINE.findall(page.read_text(encoding="utf-8")):
            line = re.sub(r" *\\\n *", " ", words).split("  ")[0]  # after two spaces stands a remark
            given = shlex.split(line, comments=True)
            found.append((page.name, name, [word for word in given if word != "..." and not word.startswith("[")]))
    return found


def test_every_flag_of_a_command_on_a_page_is_there():
    lines = command_lines()
    assert len(lines) > 60 and {name for _, name, _ in lines} >= {*OWN, *OVER}
    for page, name, words in lines:
        try:
            if name in OVER:
                module = OVER[name]
                rest = words if module is None else module.make_parser().parse_known_args(words)[1]
                flags.read_flags(rest)
            elif name in OWN and words not in (["--scorers", "help"],):
                OWN[name].make_parser().parse_args(words)
        except dpo.UserError as error:
            pytest.fail(f"{page}: python -m dpo.{name} {shlex.join(words)}: {error}")


ROWS = re.compile(r"^\|[^|]*\|[^|]*\| `(--preset [^`]*)`[^|]*\| ([\d.]+) \| (\d+) GB \|$", re.MULTILINE)


AUTO = re.compile(
    r"^\| ((?:`[\w-]+`, )+)[^|]*\| `on` \| `([\w.,]+)`, ([\d.]+) GiB \| `off`, ([\d.]+) GiB \|$", re.MULTILINE
)


@pytest.mark.slow
def test_what_auto_chooses_on_the_hardware_page_is_what_a_run_chooses():
    rows = AUTO.findall((ROOT / "docs" / "hardware.md").read_text(encoding="utf-8"))
    named = {name: rest for names, *rest in rows for name in re.findall(r"[\w-]+", names)}
    auto = [
        name for name in flags.presets() if flags.load_preset(name).get("runtime", {}).get("checkpointing") == "auto"
    ]
    assert sorted(named) == auto and len(auto) >= 4
    for name, (middle, less, most) in named.items():
        config = work.prepared(flags.parse(["--preset", name], with_pairs=False)[0])
        plans = work.planner(train.train_step)
        choices = {card: recompute.chosen(config, plans, room(card))[0] for card in (24, 40, 48, 80, 141)}
        assert {choices[card].setting for card in (24, 40, 48)} == {"on"}
        said = [(choices[card].setting, f"{choices[card].peak / GIB:.1f}") for card in (80, 141)]
        assert said == [(middle, less), ("off", most)], name


@pytest.mark.slow
def test_the_memory_of_the_hardware_page_is_what_a_plan_says(tmp_path):
    found = ROWS.findall((ROOT / "docs" / "hardware.md").read_text(encoding="utf-8"))
    assert len(found) >= 9
    for words, gib, card in found:
        assert plan.main([*words.split(), "--json", str(tmp_path / "plan.json")]) == 0
        peak = json.loads((tmp_path / "plan.json").read_text("utf-8"))["peak"] / 2**30
        assert peak == pytest.approx(float(gib), abs=0.06), words
        assert peak <= CARDS.get(int(card), 7.6), words


def cells() -> list[str]:
    """The code of the notebook, a text a cell."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 4)
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_imports_what_is_there_and_holds_no_output():
    code = ast.parse("\n".join(cells()))
    named = [node for node in ast.walk(code) if isinstance(node, ast.ImportFrom) and node.module.startswith("dpo")]
    names = {alias.name for node in named for alias in node.names}
    assert names == {"align", "errors_of", "open_pairs", "pair_loss", "read_run", "train_pairs_path"}
    exec(compile(ast.Module(named, []), "imports", "exec"), {})
    assert '"outputs": []' in (text := NOTEBOOK.read_text("utf-8")) and '"output_type"' not in text


@pytest.mark.long
def test_the_notebook_runs(tmp_path):
    """In a kernel of its own, as in Jupyter."""
    import nbformat
    from nbclient import NotebookClient

    book = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(book)
    client = NotebookClient(book, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    shown = [output for cell in book.cells for output in cell.get("outputs", [])]
    said = "".join(output.get("text", "") for output in shown)
    assert "Evidence(share=" in said and "implicit_accuracy" in said
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3
    assert (tmp_path / "runs" / "notebook" / "report.html").is_file()
