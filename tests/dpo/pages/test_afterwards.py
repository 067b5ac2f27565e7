"""dpo.pages.afterwards: the last lines of a run name real files, and commands and Python that can be taken as they stand."""

import shlex

import pytest

from dpo import evaluate, export, sample
from dpo.pages.afterwards import next_steps
from dpo.training.judging import EMBEDDED
from tests.help.fake_run import run_of

PARSERS = {"dpo.sample": sample.make_parser, "dpo.evaluate": evaluate.make_parser, "dpo.export": export.make_parser}


def steps(run, monkeypatch, **settings):
    """The lines of a run whose folder is relative, and has a space in its name."""
    folder = run.folder.rename(run.folder.with_name("red foxes"))
    monkeypatch.chdir(folder.parent)
    grids = [path.relative_to(run.folder) for path in run.grids]
    named = run._replace(folder=type(folder)("red foxes"), grids=[type(folder)("red foxes") / path for path in grids])
    named = named._replace(settings={**run.settings, "model": {**run.settings["model"], **settings}})
    return folder.resolve(), next_steps(named, EMBEDDED)


@pytest.fixture
def copied(tmp_path):
    import shutil

    def copy(kind):
        run = run_of(kind)
        folder = shutil.copytree(run.folder, tmp_path / "run")
        return run._replace(folder=folder, grids=[folder / path.relative_to(run.folder) for path in run.grids])

    return copy


@pytest.mark.parametrize("kind", ["good", "lora-gpu"])
def test_commands_are_whole_and_files_are_there(copied, monkeypatch, kind):
    folder, lines = steps(copied(kind), monkeypatch, model="owner/model")
    look, *_ = lines
    assert look.startswith(f"look at it: {folder / 'report.html'}, ")
    assert all(type(folder)(path).is_file() for path in look.removeprefix("look at it: ").split(", ")[1:2])
    commands = [shlex.split(line.split(": ", 1)[1]) for line in lines if "python -m " in line]
    assert {words[2] for words in commands} >= {"dpo.sample", "dpo.export"}
    for _, _, name, *words in commands:
        PARSERS[name]().parse_args(words)  # SystemExit or UserError where it does not know a word
        assert any(str(folder) in word for word in words), "absolute, and one word in spite of its space"
    code = "\n".join(line[4:] for line in lines if line.startswith("    "))
    compile(code, "lines", "exec")
    assert f'"{folder}"' in code and ("load_lora_weights" in code) == (kind == "lora-gpu")


@pytest.mark.parametrize(
    ("model", "judge", "prompts"), [(None, "tiny-b", "embedded:judged"), ("owner/model", "pickscore", "prompts.txt")]
)
def test_the_embedded_model_is_judged_by_its_own_judge(copied, monkeypatch, model, judge, prompts):
    run = copied("good")
    _, lines = steps(run._replace(summary={**run.summary, "evaluation": {}}), monkeypatch, model=model)
    (line,) = [line for line in lines if line.startswith("is it better")]
    given = evaluate.make_parser().parse_args(shlex.split(line.split(": ", 1)[1])[3:])
    assert given.scorers == [judge] and given.prompts == [prompts]


def test_no_export_is_advised_that_would_be_refused(copied, monkeypatch):
    _, lines = steps(copied("lora-gpu"), monkeypatch, model="owner/model", prediction_type="flow_prediction")
    assert lines and not any("dpo.export" in line for line in lines)


def test_a_model_on_this_machine_is_named_by_its_whole_path(copied, monkeypatch, tmp_path):
    (tmp_path / "base").mkdir()
    _, lines = steps(copied("lora-gpu"), monkeypatch, model="base")
    assert f'    pipe = DiffusionPipeline.from_pretrained("{tmp_path / "base"}")' in lines


def test_letters_of_any_language_stay_as_they_are(copied, monkeypatch, tmp_path):
    base = tmp_path / "L\u00e4ufe"
    base.mkdir()
    _, lines = steps(copied("lora-gpu"), monkeypatch, model=base.name)
    assert f'    pipe = DiffusionPipeline.from_pretrained("{base}")' in lines
