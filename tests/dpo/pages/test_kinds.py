"""dpo.pages.kinds: a value of a wrong kind in a run's files is one line, for whatever field."""

import json
import shutil

import pytest

from dpo import report
from dpo.common.errors import UserError
from dpo.pages.folder import read_run
from dpo.pages.verdict import verdict, warnings
from tests.help.fake_run import write_run

ODD = ("abc", {"a": 1}, [["x"]], True)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"), "dde", updates=4)


@pytest.fixture
def folder(whole, tmp_path):
    return shutil.copytree(whole, tmp_path / "run")


def refused(folder, place):
    with pytest.raises(UserError) as caught:
        read_run(folder)
    message = str(caught.value)
    assert message.startswith(str(folder / place)) and "\n" not in message and len(message) < 300 + len(str(folder))
    return message


def fields(whole, wanted):
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text("utf-8").splitlines()]
    return next((number, line) for number, line in enumerate(lines, 1) if wanted(line))


def test_every_figure_of_an_update_and_of_a_validation(whole, folder):
    metrics = folder / "metrics.jsonl"
    lines = metrics.read_text("utf-8").splitlines()
    for wanted in (lambda line: "loss" in line, lambda line: line.get("event") == "validation"):
        number, good = fields(whole, wanted)
        for name in good.keys() - {"event"}:
            for value in ODD:
                changed = [*lines[: number - 1], json.dumps(good | {name: value}), *lines[number:]]
                metrics.write_text("\n".join(changed), "utf-8")
                assert f'"{name}" is' in refused(folder, f"metrics.jsonl, line {number}")


def test_where_a_run_says_that_its_loss_starts(folder):
    for name in ("start_loss", "start_pull"):
        (folder / "metrics.jsonl").write_text(json.dumps({"event": "started", "step": 0, name: "abc"}), "utf-8")
        assert f'"{name}" is "abc", not a number' in refused(folder, "metrics.jsonl, line 1")


def test_summary_tables_and_settings(whole, folder):
    for file in ("summary.json", "tables.json"):
        good = json.loads((whole / file).read_text("utf-8"))
        for name in good:
            (folder / file).write_text(json.dumps(good | {name: 7 if isinstance(good[name], str) else "abc"}), "utf-8")
            assert f'"{name}" is' in refused(folder, file)
        (folder / file).write_text(json.dumps(good), "utf-8")
    good = (whole / "config.toml").read_text("utf-8")
    assert "\nlearning_rate = " in good
    (folder / "config.toml").write_text(good.replace("\nlearning_rate = ", '\nlearning_rate = "fast" # '), "utf-8")
    assert "learning_rate" in refused(folder, "config.toml")


@pytest.mark.long
def test_what_is_null_is_what_is_missing(whole, folder):
    for file in ("summary.json", "tables.json"):
        good = json.loads((whole / file).read_text("utf-8"))
        for name in good:  # one by one without the plots, which take a second
            (folder / file).write_text(json.dumps(good | {name: None}), "utf-8")
            run = read_run(folder)
            assert verdict(run).sentences and isinstance(warnings(run), list), name
        (folder / file).write_text(json.dumps(dict.fromkeys(good)), "utf-8")
        assert report.main([str(folder)]) == 0, file
        (folder / file).write_text(json.dumps(good), "utf-8")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("x" * 300, "name a run's output folder"),
        ("a\0b", "it is not UTF-8, or NUL"),
        ("\udcff", "it is not UTF-8, or NUL"),
    ],
)
def test_a_name_that_no_folder_can_have(name, words, capsys):
    assert report.main([name]) == 2
    said = capsys.readouterr().err
    assert words in said and said.count("\n") == 1 and len(said) < 900


def test_the_command_ends_with_one_line(folder, capsys):
    (folder / "metrics.jsonl").write_text('{"step": 1, "loss": "abc"}\n', "utf-8")
    assert report.main([str(folder)]) == 2
    said = capsys.readouterr().err.strip()
    assert 'metrics.jsonl, line 1: "loss" is "abc", not a number' in said and "\n" not in said


def test_deep_nesting_and_what_is_no_object_are_left_out(folder):
    before = read_run(folder)
    with (folder / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write("[" * 100_000 + "\n7\nnull\n")
    assert read_run(folder).updates == before.updates
