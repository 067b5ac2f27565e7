"""dpo.evaluate, from its command line to the page: models and folders of images, kept between calls, mistakes in one line."""

import json
import logging
import os
import shutil
import sys

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from dpo.evaluate import _asked, _method, _of_world, main, make_parser
from dpo.evaluating import work
from dpo.pages.folder import ADAPTER_FILE, CONFIG_FILE, INDEX_FILE, SUMMARY_FILE
from dpo.settings.config import from_mapping, to_toml
from dpo.tiny.paths import pipeline_path
from tests.help import worlds
from tests.help.judges import TRIED
from tests.help.pages import Page
from tests.help.towers import save_tiny_clip

DRAW = ["--prompts", "a red frog", "a blue cup", "a green boat", "--steps", "2", "--guidance", "3", "--batch", "3"]
SCORER = """
import torch
from pathlib import Path

class Redness:
    name, fingerprint = "redness", "redness 1"
    def score(self, *, images, captions):
        with open(Path(__file__).with_name("calls.txt"), "a") as file:
            file.write("x" * len(images))
        return torch.tensor([image.resize((1, 1)).getpixel((0, 0))[0] / 255 for image in images])

class Reds:
    name, fingerprint = "reds", "reds 1"
    def features(self, *, images):
        return Redness().score(images=images, captions=[])[:, None]
    def score(self, features, prompts):
        value = float(features.sum())
        return value, (value - 0.5, value + 0.5)
"""


@pytest.fixture
def redness(tmp_path, monkeypatch):
    """The import path of a user's own scorer, and a function that says how many images it has seen."""
    folder = tmp_path / "own"
    folder.mkdir()
    (folder / "redness.py").write_text(SCORER)
    monkeypatch.syspath_prepend(str(folder))
    yield "redness:Redness", lambda: len((folder / "calls.txt").read_text()) if (folder / "calls.txt").exists() else 0
    sys.modules.pop("redness", None)


@pytest.fixture
def run(monkeypatch, capsys):
    """run(*words) -> (exit code, lines on stderr, the result); loggers restored afterwards."""
    log = logging.getLogger("dpo")
    before = log.handlers[:], log.level, log.propagate

    def call(*words, output=None):
        capsys.readouterr()
        code = main([*map(str, words), *(["--output", str(output)] if output else [])])
        log.handlers[:], log.level, log.propagate = before
        found = (
            json.loads((output / "evaluation.json").read_text())
            if output and (output / "evaluation.json").exists()
            else None
        )
        return code, capsys.readouterr().err.splitlines(), found

    yield call
    log.handlers[:], log.level, log.propagate = before


def folder_of(place, shades, prompts=True):
    """Images of somebody else: a shade of red each, with a table of prompts."""
    place.mkdir(parents=True)
    for i, shade in enumerate(shades):
        Image.new("RGB", (16, 16), (shade, 0, 0)).save(place / f"{i}.png")
    if prompts:
        rows = "".join(f"{i}.png,prompt {i},{i % 2}\n" for i in range(len(shades)))
        (place / "prompts.csv").write_text("file,prompt,category\n" + rows)
    return place


def test_two_folders_of_images(tmp_path, run, redness):
    a, b = folder_of(tmp_path / "a", range(0, 200, 10)), folder_of(tmp_path / "b", range(20, 220, 10))
    code, errors, found = run(a, b, "--scorers", redness[0], output=tmp_path / "out")
    assert code == 0, errors
    (entry,) = found["results"]
    assert entry["paired"]["win_rate"] == 1.0 and entry["paired"]["difference"] == pytest.approx(20 / 255)
    assert entry["categories"].keys() == {"0", "1"} and not found["matching"]["b"]["by_seed"]
    assert any("how the images of a, b were drawn is not known" in line for line in found["warnings"])
    page = Page((tmp_path / "out" / "evaluation.html").read_text("utf-8"))
    assert "b is better than a" in page.text and "Largest gains by redness" in page.text
    assert "b is better than a" in (tmp_path / "out" / "evaluation.md").read_text("utf-8")
    assert redness[1]() == 40 + TRIED
    assert run(a, b, "--scorers", redness[0], output=tmp_path / "out")[0] == 0
    assert redness[1]() == 40 + 2 * TRIED, "from the cache, but for the trials"


def test_a_folder_given_twice_is_no_better_than_itself_and_sides_mirror(tmp_path, run, redness):
    a, b = folder_of(tmp_path / "a", [10, 90, 40, 70, 20, 30]), folder_of(tmp_path / "b", [20, 80, 60, 90, 10, 70])
    scorer = ["--scorers", redness[0]]
    same = run(f"one={a}", f"two={a}", *scorer, output=tmp_path / "same")[2]["results"][0]["paired"]
    assert same["win_rate"] == 0.5 and same["ties"] == 1.0 and same["difference"] == 0.0
    there, back = (
        run(x, y, *scorer, output=tmp_path / f"{x.name}{y.name}")[2]["results"][0]["paired"]
        for x, y in ((a, b), (b, a))
    )
    assert there["win_rate"] == 1 - back["win_rate"] and there["difference"] == -back["difference"]


@pytest.mark.long
def test_models_are_drawn_alike_and_a_folder_of_their_images_gives_their_figures(world, tmp_path, run, redness):
    base, other = world("sd15"), world("sd2v")
    words = [f"base={base}", f"again={base}", f"other={other}", *DRAW, "--sampler", "ddim", "--scorers", redness[0]]
    code, errors, found = run(*words, output=tmp_path / "out")
    assert code == 2 and "different protocols" in errors[-1] and "\n" not in errors[-1]
    code, errors, found = run(*words[:2], *words[3:], output=tmp_path / "out")
    assert code == 0, errors
    assert found["results"][0]["paired"]["win_rate"] == 0.5
    assert found["sides"][0]["protocol"]["steps"] == 2 and found["matching"]["again"]["by_seed"]
    seen = redness[1]()
    images = tmp_path / "out" / work.DRAWN / "base"
    code, errors, again = run(
        f"base={images}", f"again={base}", *DRAW, "--sampler", "ddim", "--scorers", redness[0], output=tmp_path / "two"
    )
    assert code == 0 and again["results"][0]["paired"] == found["results"][0]["paired"] and redness[1]() > seen


@pytest.mark.long
def test_several_guidances_of_the_base_and_training_seeds(world, tmp_path, run, redness):
    model = world("sd15")
    sides = [f"base={model}", f"one={model},two={model}"]
    words = [*DRAW[:6], "--guidance", "1,3", "--batch", "3", "--seeds", "2", "--scorers", redness[0]]
    code, errors, found = run(*sides, *words, output=tmp_path / "out")
    assert code == 0, errors
    (entry,) = found["results"]
    assert entry["paired"]["training_seeds"] == 2 and entry["worth"]["limit"] == 2
    at = entry["best_guidance"]
    assert at["paired"]["mean_a"] >= entry["paired"]["mean_a"] and at["paired"]["mean_b"] == entry["paired"]["mean_b"]
    assert (at["base"] == "base") == (at["paired"]["mean_a"] == entry["paired"]["mean_a"])
    assert at["base"] in ("base", "base, guidance 3")


@pytest.mark.long
def test_a_model_against_itself_has_the_same_set_scores_and_so_has_a_folder_of_its_images(
    world, tmp_path, run, redness
):
    save_tiny_clip(tmp_path / "clip")
    base, draw = world("sd15"), [*DRAW, "--sampler", "ddim", "--seeds", "2"]
    scorers = ["--scorers", redness[0], f"diversity:{tmp_path / 'clip'}", redness[0].replace("Redness", "Reds")]
    code, errors, found = run(f"base={base}", f"again={base}", *draw, *scorers, output=tmp_path / "out")
    assert code == 0, errors
    diversity, reds = found["sets"][:2], found["sets"][2:]
    assert [(entry["scorer"], entry["side"], entry["images"]) for entry in diversity] == [
        ("diversity", "base", 6), ("diversity", "again", 6),
    ]  # fmt: skip
    assert diversity[0]["value"] == diversity[1]["value"] > 0 and diversity[1]["difference"] == 0.0
    assert reds[0]["value"] == reds[1]["value"] and reds[1]["difference"] == 0.0
    low, high = reds[1]["difference_interval"]
    assert low == -high == pytest.approx(-(0.5**0.5))
    assert [one["name"] for one in found["scorers"]] == ["redness", "diversity", "reds"]
    assert {entry["scorer"] for entry in found["results"]} == {"redness"}
    seen = redness[1]()
    images = tmp_path / "out" / work.DRAWN / "again"
    code, errors, again = run(f"base={base}", f"again={images}", *draw, *scorers, output=tmp_path / "two")
    assert code == 0 and again["sets"] == found["sets"] and redness[1]() > seen
    assert again["results"][0]["paired"] == found["results"][0]["paired"]
    seen = redness[1]()
    assert run(f"base={base}", f"again={base}", *draw, *scorers, output=tmp_path / "out")[2]["sets"] == found["sets"]
    assert redness[1]() == seen + 2 * TRIED, "from the cache, but for the two scorers' trials"


def test_the_score_of_a_set_alone_and_what_falls(tmp_path, run, redness):
    a, b = folder_of(tmp_path / "a", range(0, 200, 10)), folder_of(tmp_path / "b", range(0, 100, 5))
    scorers = ["--scorers", redness[0].replace("Redness", "Reds")]
    code, errors, found = run(a, b, *scorers, output=tmp_path / "out")
    assert code == 0 and found["results"] == [], errors
    falls = f"reds falls: b has {950 / 255:.4g}, {-950 / 255:+.4g} against a (95 % interval "
    assert [line for line in found["warnings"] if line.startswith(falls)]
    assert any(falls in line for line in errors) and any("reds of all images of a: 7.451" in line for line in errors)
    page = Page((tmp_path / "out" / "evaluation.html").read_text("utf-8"))
    assert "Scores of the whole set" in page.text and "reds falls: b has" in page.text
    assert "| b | reds | 3.725 (3.225 to 4.225) |" in (tmp_path / "out" / "evaluation.md").read_text("utf-8")
    (b / "19.png").unlink()
    found = run(a, b, *scorers, output=tmp_path / "less")[2]
    assert found["sets"][1]["difference"] is None
    assert "reds saw 20 images of a and 19 of b, which cannot be compared: draw both alike" in found["warnings"]


def test_a_side_of_which_nothing_can_be_read_has_no_set_score(tmp_path, run, redness):
    save_tiny_clip(tmp_path / "clip")
    a, b = folder_of(tmp_path / "a", range(0, 200, 10)), folder_of(tmp_path / "b", range(0, 200, 10))
    for path in b.glob("*.png"):
        path.write_bytes(b"no image")
    scorers = [redness[0], redness[0].replace("Redness", "Reds"), f"diversity:{tmp_path / 'clip'}"]
    code, errors, found = run(a, b, "--scorers", *scorers, output=tmp_path / "out")
    assert code == 0, errors
    assert found["results"] == [] and [entry["side"] for entry in found["sets"]] == ["a"]
    assert any(line.startswith("20 images of b cannot be read and are left out") for line in found["warnings"])
    assert "reds can use no image of b" in found["warnings"]


def test_single_images_of_a_prompt_have_no_diversity_which_a_line_says(tmp_path, run, redness):
    save_tiny_clip(tmp_path / "clip")
    a, b = folder_of(tmp_path / "a", range(0, 200, 10)), folder_of(tmp_path / "b", range(20, 220, 10))
    code, errors, found = run(a, b, "--scorers", f"diversity:{tmp_path / 'clip'}", redness[0], output=tmp_path / "out")
    assert code == 0 and found["sets"] == [] and found["results"][0]["paired"]["win_rate"] == 1.0
    said = "diversity compares the images of a prompt: draw two seeds or more of each (--seeds 2)"
    assert found["warnings"].count(said) == 1 and sum(said in line for line in errors) == 1


@pytest.mark.long
def test_a_scorer_that_labelled_the_pairs_of_a_side_is_a_warning(tmp_path, run, monkeypatch):
    """The embedded world's start against a run of it: judge a labelled its pairs, judge b did not."""
    shutil.copytree(pipeline_path(), tmp_path / "aligned")
    (tmp_path / "aligned" / "config.toml").write_text(to_toml(from_mapping({"model": "embedded"})), encoding="utf-8")
    words = ["start=embedded", f"aligned={tmp_path / 'aligned'}", *DRAW, "--scorers", "tiny-a", "tiny-b"]
    code, errors, found = run(*words, output=tmp_path / "out")
    assert code == 0, errors
    same, line = sorted(found["warnings"])
    assert same == "3 of 3 images of aligned are those of start, pixel for pixel: is it another model?"
    assert line.startswith("tiny-a labelled the embedded pairs, which aligned was trained on: a gain by it is expected")
    assert sum(line in said for said in errors) == 1
    assert line in Page((tmp_path / "out" / "evaluation.html").read_text("utf-8")).text


def test_scores_of_another_program_and_a_published_table(tmp_path, run, redness):
    a, b = folder_of(tmp_path / "a", [10, 20, 30]), folder_of(tmp_path / "b", [30, 20, 10])
    table = tmp_path / "theirs.csv"
    table.write_text(
        "file,score\n" + "".join(f"{side}/{i}.png,{i * (side == 'b')}\n" for side in "ab" for i in range(3))
    )
    code, errors, found = run(a, b, "--scores", f"theirs={table}", output=tmp_path / "out")
    assert code == 0 and found["results"][0]["scorer"] == "theirs" and found["results"][0]["paired"]["mean_b"] == 1.0
    code, errors, _ = run(
        a, b, "--scores", f"pickscore={table}", "--reproduce", "lpo", "--scorers", redness[0], output=tmp_path / "p"
    )
    assert code == 2 and "call one NAME=MODEL, with a name of SD1.5" in errors[-1]
    words = [
        f"SD1.5={a}",
        f"SD1.5 Diffusion-DPO={b}",
        "--scores",
        f"pickscore={table}",
        "--reproduce",
        "lpo",
        "--scorers",
        redness[0],
    ]
    code, errors, found = run(*words, output=tmp_path / "q")
    assert code == 0, errors
    assert [(line["model"], line["published"]) for line in found["published"]["lines"]] == [
        ("SD1.5", 20.56),
        ("SD1.5 Diffusion-DPO", 20.99),
    ]
    assert "unstated" in json.dumps(found["published"]["protocol"])


def test_a_published_table_is_asked_for_the_names_of_scores(tmp_path):
    """Not for the words that say where the weights are."""
    weights = {"visual.conv1.weight": torch.zeros(1), "text_projection": torch.zeros(1)}
    save_file(weights, tmp_path / "hps.safetensors", metadata={"source": "HPS_v2.1_compressed.pt"})
    scorer = f"hpsv2.1:{tmp_path / 'hps.safetensors'}"
    words = ["SD1.5=embedded", "b=embedded", "--reproduce", "lpo", "--scorers", scorer]
    assert _asked(make_parser().parse_args(words), "").scorers == (scorer,)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["a"], "name at least two"),
        (["a", "b"], "nothing to measure by"),
        (["a", "b", "--scorers", "tiny-c"], "did you mean tiny-"),
        (["a,b", "c", "--scorers", "tiny-b"], "the base is one model"),
        (["a", "x/a", "--scorers", "tiny-b"], "two sides are called a"),
        (["a", "b", "--scorers", "tiny-b", "--guidance", "much"], "--guidance"),
        (["a", "b", "--scores", "x"], "expected NAME=TABLE"),
        (["a", "b", "--reproduce", "dde"], "no such table"),
        (["SD1.5=embedded", "b=embedded", "--reproduce", "lpo", "--scorers", "tiny-b"], "has no numbers by tiny-b"),
        (["embedded", "out/nothing", "--scorers", "tiny-b"], "there is no folder out/nothing here"),
        (["embedded", "out/nothing", "--scorers", "pickscore"], "there is no folder out/nothing here"),
        (["embedded", "b=start:nothing", "--scorers", "tiny-b"], "nothing holds no run"),
        (["embedded", "b=embedded", "--pairs", "nowhere"], "nowhere: no such file or folder"),
        (["embedded", "b=embedded", "--scorers", "tiny-b", "tiny-b"], "its scores are called tiny-b"),
        (["embedded", "b=embedded", "--scorers", "tiny-b:x"], "takes no place"),
        (["embedded", "b=embedded", "--scorers", "tiny-b", "--prompts", "embedded:judge"], "did you mean embedded"),
        (["nowhere", "b", "--scorers", "tiny-b", "--prompts", "x"], "nowhere"),
        (["nowhere", "b", "--scorers", "imagereward", "--prompts", "x"], "imagereward: its weights are published as a"),
        (
            ["nowhere", "b", "--scorers", "inception-tv", "--prompts", "x"],
            "inception-tv: its weights are published as a",
        ),
        (["nowhere", "b", "--scorers", "inception-tf:gone", "--prompts", "x"], "gone is no .safetensors file"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, run, monkeypatch, words, said):
    monkeypatch.chdir(tmp_path)
    code, errors, _ = run(*words)
    mine = [line for line in errors if line.startswith("dpo.evaluate: ")]
    assert code == 2 and len(mine) == 1 and said in mine[0]
    assert not list(tmp_path.rglob("*.png")), "nothing is drawn"


@pytest.mark.parametrize(
    "words", [["--subset", "2"], ["--prompts", "a red circle"], ["--guidance", "1,2"], ["--seeds", "7"]]
)
def test_flags_of_a_drawing_mean_nothing_to_folders_of_images(tmp_path, run, words):
    a, b = folder_of(tmp_path / "a", [10, 20]), folder_of(tmp_path / "b", [30, 20])
    code, errors, _ = run(str(a), str(b), "--scorers", "tiny-b", *words, output=tmp_path / "out")
    assert code == 2 and f"{words[0]} is of the drawing, and all sides are folders of images" in errors[-1]
    code, errors, _ = run(str(a), str(b), "--pairs", "embedded", output=tmp_path / "out")
    assert code == 2 and "--pairs needs models, and a is a folder of images" in errors[-1]


@pytest.mark.long
def test_the_accuracy_on_pairs_alone_draws_nothing(world, tmp_path, run):
    base, other = world("sd15"), tmp_path / "other"
    shutil.copytree(base, other)
    with safe_open(other / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        weights = {name: file.get_tensor(name) * 1.01 for name in file.keys()}  # noqa: SIM118  # no mapping
    save_file(weights, other / "unet" / "diffusion_pytorch_model.safetensors", {"format": "pt"})
    pairs = worlds.make_pickapic(tmp_path / "pairs", 6)
    code, errors, found = run(f"base={base}", f"dpo={other}", "--pairs", str(pairs), output=tmp_path / "out")
    assert code == 0, errors
    assert [one["side"] for one in found["accuracy"]] == ["dpo"] and not list((tmp_path / "out").rglob("*.png"))
    assert any("implicit preference accuracy of dpo against base: " in line for line in errors)
    page = Page((tmp_path / "out" / "evaluation.html").read_text("utf-8"))
    assert "By tenth of the timesteps" in page.text and "Is it better" not in page.text


def test_without_a_run_the_way_to_one_is_said(tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, errors, _ = run()
    assert code == 2 and "make one with python -m dpo.train" in errors[-1]


def test_the_newest_run_may_be_a_lora(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for age, (name, result) in enumerate({"lora": ADAPTER_FILE, "full": INDEX_FILE, "killed": "metrics.jsonl"}.items()):
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / CONFIG_FILE).write_text(to_toml(from_mapping({})))
        for file in (result, SUMMARY_FILE):
            (folder / file).write_text("{}")
        os.utime(folder / SUMMARY_FILE, (0, -age))
    assert _of_world()[:2] == ["start=start:runs/lora", "lora=runs/lora"]


def test_a_run_without_a_result_is_no_folder_of_images(tmp_path, run):
    """Its sample grids are no side of a comparison."""
    place = folder_of(tmp_path / "run" / "samples", [10, 20]).parent
    (place / CONFIG_FILE).write_text(to_toml(from_mapping({})))
    code, errors, _ = run(f"a={place}", f"b={place}", "--scorers", "tiny-b", output=tmp_path / "out")
    assert code == 2 and "holds a run that is not finished" in errors[-1]


def test_flags_that_work_alone_take_an_equals_sign(tmp_path, run, capsys):
    assert main(["--scorers=help"]) == 0 and "pickscore" in capsys.readouterr().out
    code, errors, _ = run(f"--convert={tmp_path / 'gone.pt'}")
    assert code == 2 and "gone.pt" in errors[-1] and "--convert" not in errors[-1].replace("such as", "")


def test_hostile_images_and_prompts_leave_the_page_whole(tmp_path, run, redness):
    a, b = folder_of(tmp_path / "a", [10, 20, 30, 40]), folder_of(tmp_path / "b", [30, 20, 10, 90])
    evil = ["</td><script>alert(1)</script>", "../../etc/passwd", "x" * 10_000, "\u202e\u0000 🦊"]
    for side in (a, b):
        rows = [{"file": f"{i}.png", "prompt": text} for i, text in enumerate(evil)]
        (side / "prompts.csv").unlink()
        (side / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (b / "1.png").write_bytes(b"no image")
    code, errors, found = run(a, b, "--scorers", redness[0], output=tmp_path / "out")
    assert code == 0, errors
    assert len(found["sides"][1]["unusable"]) == 1 and found["results"][0]["paired"]["images"] == 3
    page = Page((tmp_path / "out" / "evaluation.html").read_text("utf-8"))
    assert "script" not in page.tags
    shutil.rmtree(a)
    assert run(a, b, "--scorers", redness[0], output=tmp_path / "out")[0] == 2


@pytest.mark.parametrize(
    ("side", "name", "seeds"),
    [
        ("runs/a", "a", {"a": "runs/a"}),
        ("runs/a,runs/b", "a + b", {"a": "runs/a", "b": "runs/b"}),
        ("dpo=runs/a,runs/b", "dpo", {"dpo 1": "runs/a", "dpo 2": "runs/b"}),
        ("x=runs/a,y=runs/b", "x + y", {"x": "runs/a", "y": "runs/b"}),
        ("with=,comma", "with=,comma", {"with=,comma": "with=,comma"}),
    ],
)
def test_a_method_is_called_as_asked(tmp_path, monkeypatch, side, name, seeds):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "with=,comma").mkdir()
    method = _method(side)
    assert method.name == name and {one.name: one.place for one in method.seeds} == seeds
