"""dpo.extract: the command's words, exit codes, its table, and the files that it leaves."""

import csv

import pytest

from dpo import export, extract
from tests.help.handed import lora_run


@pytest.fixture
def said(capsys):
    """The command: exit code, lines of stdout, last line of stderr."""

    def say(*words):
        capsys.readouterr()
        code = extract.main([str(word) for word in words])
        out, err = capsys.readouterr()
        return code, out.splitlines(), (err.splitlines() or [""])[-1]

    return say


@pytest.mark.long
def test_a_lora_its_table_and_what_is_said_of_them(world, said, tmp_path):
    lora_run(tmp_path / "run", world("sd15"))
    assert export.main([str(tmp_path / "run"), "--to", "single-file", "--merge"]) == 0
    aligned = tmp_path / "run.safetensors"
    code, out, _ = said(aligned, "--base", world("sd15"), "--energy", "0.999999", "--device", "cpu")
    lora, rows = tmp_path / "run-lora.safetensors", tmp_path / "run-lora.csv"
    assert code == 0 and out[-2:] == [str(rows), str(lora)] and lora.is_file()
    assert out[0].split()[:3] == ["block", "layers", "change"]
    assert any(line.startswith("down_blocks.0") and "100.0%" in line for line in out)
    assert any(line.startswith("The LoRA holds 100.00% of the squared change") for line in out)
    with open(rows, encoding="utf-8", newline="") as file:
        found = list(csv.DictReader(file))
    assert {row["rank"] for row in found} == {"3"} and all(0 < float(row["relative_change"]) < 10 for row in found)
    code, _, error = said(aligned, "--base", world("sd15"), "--rank", "2")
    assert code == 2 and error == f"dpo.extract: {lora} is there already: remove it, or name another file with --output"


@pytest.mark.parametrize(
    ("words", "error"),
    [
        ([], "say how much to keep: --rank 64, or --energy 0.95; one of them"),
        (["--rank", "4", "--energy", "0.9"], "say how much to keep: --rank 64, or --energy 0.95; one of them"),
        (["--rank", "4", "--max-rank", "8"], "--max-rank has no effect without --energy: leave it out"),
        (["--rank", "0"], "argument --rank: 0 is below 1"),
        (["--energy", "x"], "argument --energy: invalid number value: 'x'"),
        (["--energy", "95"], "argument --energy: 95 is no share above 0 and up to 1"),
        (["--rank", "4", "--output", "a.pt"], "--output a.pt: name a .safetensors file, or a folder"),
    ],
)
def test_mistakes_cost_one_line(said, words, error):
    assert said("a", "--base", "b", *words) == (2, [], f"dpo.extract: {error}")


def test_a_refusal_leaves_no_folder(said, tmp_path):
    code, _, error = said(tmp_path / "none", "--base", tmp_path / "base", "--rank", "4", "--output", tmp_path / "a/b")
    assert code == 2 and "none" in error and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("aligned", "name"),
    [("start:{}/run/", "run-start-lora"), ("{}/run", "run-lora"), ("owner/model", "here/model-lora")],
)
def test_the_lora_is_named_after_its_model_and_lies_beside(tmp_path, monkeypatch, aligned, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    words = [aligned.format(tmp_path), "--base", "b", "--rank", "4"]
    assert extract._output(extract.make_parser().parse_args(words)) == tmp_path / f"{name}.safetensors"
