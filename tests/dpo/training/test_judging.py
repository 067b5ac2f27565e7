"""The end of a run: its result compared with its start, or not, or cut short, or failed; the run is whole all the same."""

import gc
import json
import re
import shutil
import weakref
from types import SimpleNamespace

import pytest
import torch

from dpo import evaluate, train
from dpo.common.errors import UserError
from dpo.sampling import work as sampling
from dpo.settings.config import Config, change
from dpo.tiny.paths import pipeline_path
from dpo.training import build, judging
from dpo.training.embedded import embedded

FLAGS = [
    "--preset",
    "tiny",
    "--steps",
    "1",
    "--batch-size",
    "2",
    "--validate-every",
    "0",
    "--no-samples",
    "--threads",
    "1",
]


def run(folder, *flags) -> int:
    return train.main([*FLAGS, "--output", str(folder), *flags])


def summary(folder) -> dict:
    return json.loads((folder / "summary.json").read_text())


@pytest.fixture(scope="module")
def unjudged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unjudged") / "run"
    assert run(folder, "--no-judge") == 0
    return folder


@pytest.fixture
def again(unjudged, tmp_path):
    """A finished run that nothing is compared of, yet."""
    return shutil.copytree(unjudged, tmp_path / "run")


@pytest.fixture
def few_prompts(monkeypatch):
    """Four prompts of the embedded world instead of all."""
    monkeypatch.setitem(sampling.OF_WORLD, ("embedded:judged",), ("report", 4))


@pytest.mark.long
def test_judging_can_be_left_out(unjudged):
    assert summary(unjudged)["status"] == "finished" and not summary(unjudged)["evaluation"]
    assert (unjudged / "report.html").exists() and (unjudged / "model_index.json").exists()
    assert not (unjudged / "evaluation").exists()


@pytest.mark.long
def test_a_run_is_judged_and_says_that_nothing_was_left_to_train(again, few_prompts, capsys):
    assert train.main(["--output", str(again), "--resume", "latest", "--judge"]) == 0
    said = capsys.readouterr().err
    assert "update 1 of 1 was made before: nothing is trained; raise --steps to go on" in said
    assert re.search(r"INFO image 4/4  \S+ images/s  ETA ", said), "drawing says how far it is"
    assert all(f"INFO image 8/8  {judge}, aligned  ETA " in said for judge in ("tiny-b", "tiny-b-faithful")), (
        "so does judging"
    )
    found = summary(again)
    figures = found["evaluation"]
    assert found["status"] == "finished" and not found["reason"]
    assert figures["prompts"] == 4 and 0 <= figures["win_rate"] <= 1 and figures["faithfulness_before"] > 0.7
    assert figures["judge"] == "tiny-b"
    content = json.loads((again / "evaluation" / "evaluation.json").read_text())
    assert content["results"][0]["paired"]["win_rate"] == figures["win_rate"]
    assert (again / "evaluation" / "evaluation.html").is_file() and "Win rate over the start" in (
        again / "report.html"
    ).read_text("utf-8")
    events = [json.loads(line) for line in (again / "metrics.jsonl").read_text().splitlines()]
    assert [event for event in events if event.get("event") == "judged"][-1]["win_rate"] == figures["win_rate"]
    assert train.main(["--output", str(again), "--resume", "latest", "--no-judge"]) == 0
    assert summary(again)["evaluation"] == figures, "a later visit keeps what is known"


@pytest.mark.slow
def test_images_of_weights_that_were_trained_on_are_drawn_again(again):
    drawn = ["--evaluate-prompts", "a frog", "an owl", "a red cup", "a blue car", "--sample-steps", "2"]
    words = ["--output", str(again), "--resume", "latest", "--judge", *drawn]
    assert train.main(words) == 0
    (again / "evaluation" / "note.txt").write_text("mine")
    drawn = sorted((again / "evaluation" / "images" / "aligned" / "images").glob("*.png"))
    before = [path.read_bytes() for path in drawn]
    assert train.main([*words, "--steps", "2"]) == 0
    after = [path.read_bytes() for path in sorted((again / "evaluation/images/aligned/images").glob("*.png"))]
    assert len(before) == len(after) == 4 and before != after
    assert (again / "evaluation" / "note.txt").read_text() == "mine" and summary(again)["evaluation"]["prompts"] == 4


@pytest.mark.long
def test_ctrl_c_while_judging_leaves_the_model_and_its_report(tmp_path, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "evaluated", interrupted)
    folder = tmp_path / "run"
    assert run(folder) == 130
    said = capsys.readouterr().err
    assert "the comparison was cut short; the aligned model in" in said
    assert f"--output {folder} --resume latest" in said
    assert (
        summary(folder)["status"] == "interrupted" and not summary(folder)["evaluation"]
    )  # a sweep will go on with it
    assert (folder / "report.html").exists() and (folder / "model_index.json").exists()


ERRORS = [UserError("no network"), torch.OutOfMemoryError("full")]


@pytest.mark.parametrize("error", ERRORS)
def test_a_comparison_that_fails_is_said(caplog, error):
    def failing(words):
        raise error

    assert judging.evaluated(failing, ["start=a", "aligned=b"]) == {}
    assert f"not compared with its start ({error})" in caplog.text
    assert "Later: python -m dpo.evaluate start=a aligned=b" in caplog.text


@pytest.mark.long
@pytest.mark.parametrize("error", [ERRORS[0], pytest.param(ERRORS[1], marks=pytest.mark.slow)])
def test_a_comparison_that_fails_leaves_a_finished_run(again, monkeypatch, capsys, pageless, error):
    def failing(*_):
        raise error

    monkeypatch.setattr(evaluate, "evaluated", failing)
    assert train.main(["--output", str(again), "--resume", "latest", "--judge"]) == 0
    said = capsys.readouterr().err
    assert f"not compared with its start ({error})" in said and "Later: python -m dpo.evaluate start=" in said
    assert summary(again)["status"] == "finished" and not summary(again)["evaluation"]


@pytest.mark.long
def test_the_trainers_memory_is_free_by_then(tmp_path, monkeypatch, pageless):
    kept, alive = [], []
    make = build.build

    def built(*args):
        made = make(*args)
        kept.extend([weakref.ref(made), weakref.ref(made.model.denoiser), weakref.ref(made.updater.optimizer)])
        return made

    def seen(words):
        gc.collect()
        alive.extend(ref() is not None for ref in kept)
        raise UserError("seen")

    monkeypatch.setattr(build, "build", built)
    monkeypatch.setattr(evaluate, "evaluated", seen)
    assert run(tmp_path / "run") == 0
    assert alive == [False, False, False]


@pytest.mark.long
def test_scorers_and_prompts_of_ones_own(world, tmp_path, capsys, monkeypatch, pageless):
    """A LoRA on another start than the model's own: what it is compared with is that start, on held-out captions."""
    (tmp_path / "own.py").write_text(
        "import torch\n"
        "class Grey:\n"
        "    name, fingerprint = 'grey', 'grey 1'\n"
        "    def score(self, *, images, captions):\n"
        "        return torch.tensor([float(image.convert('L').resize((1, 1)).getpixel((0, 0))) for image in images])\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    words = [
        "--model", str(world("sd15")), "--data", str(world("pairs")), "--lora", "--rank", "2", "--steps", "1",
        "--validation-fraction", "0.25", "--validate-every", "0", "--no-samples", "--evaluate", "own:Grey",
        "--sample-steps", "2",
    ]  # fmt: skip
    folder = tmp_path / "runs, all" / "one"
    assert train.main([*words, "--output", str(folder)]) == 0, capsys.readouterr().err
    found = summary(folder)["evaluation"]
    assert found["judge"] == "grey" and found["prompts"] > 0
    content = json.loads((folder / "evaluation" / "evaluation.json").read_text())
    assert [side["name"] for side in content["sides"]] == ["start", "aligned"]
    assert content["sides"][0]["protocol"]["steps"] == 2
    prompts = [json.loads(line)["prompt"] for line in (folder / "evaluation/prompts.jsonl").read_text().splitlines()]
    assert len(prompts) == found["prompts"]


@pytest.mark.parametrize("prompts", [(), ("a frog",)])
def test_scorers_are_kept_where_the_run_keeps_its_downloads(tmp_path, monkeypatch, prompts):
    config = change(
        Config(),
        evaluate=["pickscore"],
        evaluate_prompts=prompts,
        cache_dir="kept",
        sample_steps=4,
        sample_guidance=7.0,
    )
    monkeypatch.setattr(judging.outcome, "is_embedded", lambda model: True)
    asked = evaluate.make_parser().parse_args(
        judging.words(SimpleNamespace(config=config, output=tmp_path, model=None))
    )
    assert asked.cache_dir == "kept" and asked.scorers == ["pickscore"]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--evaluate", "tiny-c"], "did you mean tiny-"),
        (["--evaluate", "nowhere:Scorer"], "cannot be imported"),
    ],
)
def test_a_misspelt_scorer_is_one_line_before_anything_is_trained(tmp_path, capsys, flags, said):
    assert run(tmp_path / "run", *flags) == 2
    assert said in capsys.readouterr().err.splitlines()[-1] and not (tmp_path / "run").exists()


def test_without_held_out_captions_prompts_are_asked_for(world, tmp_path, capsys):
    words = ["--model", str(world("sd15")), "--data", str(world("pairs")), "--steps", "1", "--validation-fraction", "0"]
    assert train.main([*words, "--output", str(tmp_path / "run"), "--evaluate", "tiny-b"]) == 2
    assert "give --evaluate-prompts" in capsys.readouterr().err.splitlines()[-1]


def test_none_held_out_of_the_embedded_world_is_none():
    """--validation-fraction 0 says none, whatever ships beside the training pairs."""
    given = {fraction: embedded(change(Config(), validation_fraction=fraction)).data for fraction in (None, 0.0, 0.2)}
    assert given[None].validation_data is not None
    assert given[0.0].validation_data is None and given[0.2].validation_data is None


def test_the_embedded_model_has_a_name_beside_pairs_of_ones_own():
    config = embedded(change(Config(), model="embedded", data="own.parquet"))
    assert (config.model.model, config.data.data) == (str(pipeline_path()), "own.parquet")
    assert embedded(change(Config(), model="embedded")) == embedded(Config())
    assert embedded(change(Config(), model="other", data="own.parquet")).model.model == "other"
