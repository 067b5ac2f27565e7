"""The rooms of the source: which may call which, and what may not stand in one. Read from the files, nothing is run.

A failure says which line of which file breaks which rule, and what to do. CONTRIBUTING.md has the same rooms in words.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.help.imports import Import, cycle, imports, modules, named

ROOT = Path(__file__).parents[1]
SOURCE = modules(ROOT, "dpo", "csrc_triton")
ALL = SOURCE | modules(ROOT, "benchmarks")
ARROWS = imports(ALL)

COMMANDS = (
    "train",
    "prepare",
    "sweep",
    "report",
    "sample",
    "evaluate",
    "label",
    "vote",
    "plan",
    "replay",
    "export",
    "extract",
    "pairs",
)  # dpo/*.py that a person runs; the other files there are the method

# A room -> what it may call besides itself. "room" allows all of a room, "room.file" that file alone. A file of dpo/ that is no
# command is a room of its own. Everybody may call `common` and `methods`, except csrc_triton and these two themselves.
MAY_CALL = {
    "benchmarks": "anything",
    "commands": "training sampling evaluating labelling pairing voting planning replaying exporting scorers tiny models data drawing pages settings "
    "step objective",
    "training": "tiny step encode objective credit correction reference schedule models data drawing pages settings csrc_triton",
    "sampling": "tiny models drawing pages.began pages.folder pages.standing settings",
    "evaluating": "sampling scorers training encode objective models data drawing pages settings tiny",
    "labelling": "sampling scorers evaluating pairing.choose data drawing models pages settings tiny",
    "pairing": "data drawing pages settings",
    "replaying": "training encode objective models data pages settings",
    "exporting": "sampling planning.sketch models pages settings",
    "voting": "evaluating scorers data drawing pages settings",
    "planning": "training reference schedule correction encode step models data pages settings csrc_triton",
    "scorers": "",
    "tiny": "scorers drawing models",
    "tiny.making": "training sampling tiny drawing models data.writing",  # and tiny/build.py, the command that makes the embedded world again
    "step": "encode objective reference schedule models data.batch csrc_triton",
    "encode": "models data.batch csrc_triton",
    "reference": "models schedule settings",
    "models": "schedule settings csrc_triton",
    "data": "settings schedule csrc_triton.philox",
    "pages": "drawing.grid settings",
    "drawing": "",
    "settings": "",
    "credit": "schedule",
    "correction": "",
    "objective": "csrc_triton.pair_errors",  # what the fused op hands over for each pair
    "schedule": "csrc_triton.timesteps",
    "methods": "",
    "common": "",
    "csrc_triton": "",
}
SHARED = ("common", "methods")

# Arrows against the table that stand for now: (file, file) and why. Take a line out once the arrow is gone.
EXCEPTIONS: dict[tuple[str, str], str] = {
    ("dpo.sweep", "dpo.train"): "a sweep does what the train command does, one run after another",
}


def room(name: str) -> str:
    """The room of a module: "models" for dpo.models.lora, "commands" for dpo.train, "objective" for dpo.objective."""
    first, *rest = name.split(".")
    if first != "dpo" or not rest:
        return first
    if name.startswith(("dpo.tiny.making", "dpo.tiny.build")):
        return "tiny.making"
    return "commands" if rest[0] in COMMANDS else rest[0]


def place(arrow: Import) -> str:
    return f"{ALL[arrow.of].relative_to(ROOT)}:{arrow.line} imports {arrow.target}"


def allowed(arrow: Import) -> bool:
    """Whether the table has this arrow between two rooms."""
    of, target = room(arrow.of), room(arrow.target)
    may = MAY_CALL.get(of, "").split()
    if target in SHARED:
        return of not in (*SHARED, "csrc_triton")
    file = arrow.target.removeprefix("dpo.")
    return may == ["anything"] or any(f"{file}.".startswith(f"{entry}.") or target == entry for entry in may)


def test_every_room_is_in_the_table():
    unknown = sorted({room(name) for name in ALL if name != "dpo"} - MAY_CALL.keys())
    assert unknown == [], (
        f"say in MAY_CALL of {Path(__file__).name}, and in CONTRIBUTING.md, what these may call: {unknown}"
    )


def test_rooms_call_only_what_the_table_allows():
    between = [arrow for arrow in ARROWS if room(arrow.of) != room(arrow.target)]
    wrong = [arrow for arrow in between if not allowed(arrow) and (arrow.of, arrow.target) not in EXCEPTIONS]
    lines = [
        f"{place(arrow)}: {room(arrow.of)} may call: {MAY_CALL.get(room(arrow.of)) or 'common alone'}"
        for arrow in wrong
    ]
    assert lines == [], "\n".join(
        ["move the function to a room that both may call, or hand its result in as an argument:", *lines]
    )


def test_no_exception_is_out_of_date():
    there = {(arrow.of, arrow.target) for arrow in ARROWS}
    assert [pair for pair in EXCEPTIONS if pair not in there] == [], (
        "these arrows are gone: take their lines out of EXCEPTIONS"
    )


def test_only_commands_and_benchmarks_import_the_train_command():
    wrong = [
        place(arrow)
        for arrow in ARROWS
        if arrow.target == "dpo.train" and room(arrow.of) not in ("commands", "benchmarks")
    ]
    assert wrong == [], f"what two files need belongs in a room (dpo/training, say), not in the command: {wrong}"


def test_no_module_imports_itself_by_way_of_others():
    assert cycle(ARROWS) == [], (
        "each of these imports the next: move what the last needs of the first to a file of its own"
    )


def test_packages_import_nothing():
    wrong = [
        f"{path.relative_to(ROOT)} imports {target}"
        for name, path in ALL.items()
        if path.name == "__init__.py"
        for target, _ in named(name, path)
        if target.split(".")[0] in ("dpo", "csrc_triton", "benchmarks", "torch")
    ]
    assert wrong == [], f"an __init__.py holds a docstring that lists its doors; import from the file itself: {wrong}"


@pytest.mark.parametrize(
    "package", sorted({name for name in SOURCE if SOURCE[name].name == "__init__.py" and name.count(".")})
)
def test_a_package_lists_its_files_and_no_others(package):
    folder = SOURCE[package].parent
    text = ast.get_docstring(ast.parse(SOURCE[package].read_text(encoding="utf-8"))) or ""
    doors = [path.name for path in folder.glob("*.py") if path.name != "__init__.py"]
    doors += [f"{path.parent.name}/" for path in folder.glob("*/__init__.py")]
    missing = [door for door in doors if door not in text]
    assert missing == [], f"say in the docstring of {SOURCE[package].relative_to(ROOT)} what these hold: {missing}"
    words = [word.strip(".,:;|()") for word in text.split()]
    gone = [word for word in words if word.endswith(".py") and not ((folder / word).exists() or (ROOT / word).exists())]
    assert gone == [], f"the docstring of {SOURCE[package].relative_to(ROOT)} names files that are not there: {gone}"


def test_the_top_of_the_package_holds_commands_and_the_method_only():
    files = sorted(path.name for path in (ROOT / "dpo").glob("*.py"))
    assert len(files) <= len(COMMANDS) + 9, (
        f"a new file belongs in a room; dpo/ holds commands and the method, and has {len(files)} files: {files}"
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_installed(command):
    text = (ROOT / "setup.py").read_text(encoding="utf-8")
    assert f'"dpo-{command} = dpo.{command}:main"' in text, "name it under console_scripts in setup.py"


LONG = {  # files of more than 400 lines, and why
    "dpo/training/build.py": "the one place that puts a run together, in order",
    "dpo/settings/compat.py": "one table: the peers' flags, defaults and meanings, and the page that shows it",
    "dpo/settings/config.py": "one table: every setting with its default and help",
    "dpo/objective.py": "the one place of every loss, which a new one is added to",
    "dpo/pages/folder.py": "one table: every file that a run leaves, beside the few lines that read them back",
    "dpo/pages/charts.py": "one table: every chart with its words, beside the few lines that draw it",
}


def test_no_file_is_longer_than_400_lines():
    long = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCE.values()}
    wrong = {name: lines for name, lines in long.items() if lines > 400 and name not in LONG}
    assert wrong == {}, f"cut them where one idea ends, or give the reason in LONG: {wrong}"


PARSER = "it reads the command line"
LOUD = {  # files that may print, parse arguments or exit, besides the commands, and why
    "dpo.settings.flags": PARSER,
    "dpo.sampling.flags": PARSER,
    "dpo.tiny.build": "a command",
    "dpo.data.loader": "a worker process ends with its main process",
    "dpo.common.command": "what all commands share: the line on stderr and the exit code",
}


def loud(tree: ast.AST) -> list[tuple[int, str]]:
    """Lines that print, parse arguments or end the process."""
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Name(id="print")):
                found.append((node.lineno, "prints"))
            case ast.Import(names=names) if any(alias.name == "argparse" for alias in names):
                found.append((node.lineno, "parses arguments"))
            case ast.ImportFrom(module="argparse"):
                found.append((node.lineno, "parses arguments"))
            case ast.Attribute(value=ast.Name(id="sys"), attr="exit" | "argv") | ast.Attribute(attr="_exit"):
                found.append((node.lineno, f"calls {ast.unparse(node)}"))
            case ast.Name(id="SystemExit"):
                found.append((node.lineno, "raises SystemExit"))
    return found


def test_only_commands_print_parse_arguments_or_exit():
    quiet = {name: path for name, path in SOURCE.items() if room(name) != "commands" and name not in LOUD}
    wrong = [
        f"{path.relative_to(ROOT)}:{line} {what}"
        for path in quiet.values()
        for line, what in loud(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert wrong == [], (
        f"log through logging.getLogger('dpo'), raise UserError, or return what the command should print: {wrong}"
    )


# --- the reader itself --------------------------------------------------------------------------------------------------


@pytest.fixture
def house(tmp_path):
    """Write a small tree from {path: text}; its modules."""

    def build(**files: str) -> dict[str, Path]:
        for name, text in {"__init__": "", **files}.items():
            path = tmp_path / "house" / f"{name.replace('__in__', '/')}.py"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
        return modules(tmp_path, "house")

    return build


def test_imports_are_seen_wherever_they_stand(house):
    found = imports(
        house(
            a="import house.b\nfrom house import c as other\nimport torch\n",
            b="def f():\n    from house.c import thing\n    return thing\n",
            c="if TYPE_CHECKING:\n    from .room.d import D\n",
            room__in____init__="",
            room__in__d="from . import e\nfrom .. import a\n",
            room__in__e="",
        )
    )
    assert [tuple(arrow) for arrow in found] == [
        ("house.a", "house.b", 1),
        ("house.a", "house.c", 2),
        ("house.b", "house.c", 2),
        ("house.c", "house.room.d", 2),
        ("house.room.d", "house.room.e", 1),
        ("house.room.d", "house.a", 2),
    ]
    assert cycle(found) == ["house.a", "house.b", "house.c", "house.room.d", "house.a"]
    assert cycle([arrow for arrow in found if arrow.of != "house.c"]) == []


def test_arrows_back_and_to_other_files_of_a_room_are_refused():
    assert allowed(Import("dpo.training.build", "dpo.models.lora", 1))
    assert not allowed(Import("dpo.models.lora", "dpo.training.build", 1))
    assert allowed(Import("dpo.pages.report", "dpo.drawing.grid", 1))
    assert not allowed(Import("dpo.pages.report", "dpo.drawing.draw", 1))
    assert allowed(Import("dpo.data.batch", "csrc_triton.philox", 1))
    assert not allowed(Import("dpo.data.batch", "csrc_triton.noising", 1))
    assert not allowed(Import("csrc_triton.philox", "dpo.common.errors", 1))
    assert not allowed(Import("dpo.tiny.judge", "dpo.tiny.build", 1))


def test_what_is_loud_is_heard():
    text = "import sys, argparse\ndef f():\n    print(1)\n    sys.exit(2)\nos._exit(1)\nraise SystemExit(0)\nlog.info('print(')\n"
    assert [line for line, _ in sorted(loud(ast.parse(text)))] == [1, 3, 4, 5, 6]
