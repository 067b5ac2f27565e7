"""The command line: every setting as a flag, starting points, help, and mistakes told in one line.

The list of flags is frozen in flags.txt, so that a change of it is seen in review. Write it anew with
`python -m tests.dpo.settings.test_flags > tests/dpo/settings/flags.txt`.
"""

import argparse
import os
import sys
import tomllib
from pathlib import Path

import pytest

from dpo import prepare
from dpo.common.errors import UserError
from dpo.settings.advice import headline, warnings
from dpo.settings.compat import FOREIGN
from dpo.settings.config import Config, change, flatten, from_mapping, specs, to_toml
from dpo.settings.flags import (
    asked,
    help_of,
    help_text,
    load_config,
    load_preset,
    make_parser,
    parse,
    presets,
    shown,
)
from dpo.settings.resolve import DeviceFacts, ModelFacts, resolve
from tests.dpo.settings.test_config import PAIRED, altered

BASE = ["--model", "m", "--data", "d"]
FROZEN = Path(__file__).with_name("flags.txt")


def as_flags(name, value, spelling=None):
    """One setting as words of a command line."""
    flag = "--" + (spelling or name.replace("_", "-"))
    if isinstance(value, bool):
        return [flag if value else "--no-" + flag[2:]]
    return [flag, *(str(item) for item in (value if isinstance(value, tuple) else (value,)))]


@pytest.mark.parametrize("name", list(specs()))
def test_every_setting_is_a_flag_in_both_spellings_and_under_its_aliases(name):
    cfg, values = altered(name)
    for spelling in {name, name.replace("_", "-"), *specs()[name].meta["aliases"]}:
        words = [word for other, value in (PAIRED | values).items() if other != name for word in as_flags(other, value)]
        parsed, _ = parse([*words, *as_flags(name, values[name], spelling)])
        assert parsed == change(cfg, **PAIRED) if name not in PAIRED else parsed == cfg


def test_a_setting_can_be_unset_and_flags_beat_files(tmp_path):
    path = tmp_path / "c.toml"
    path.write_text(to_toml(from_mapping({**PAIRED, "beta": 7.0, "steps": 5, "flip": True})))
    cfg, notes = parse(
        ["--config", str(path), "--beta", "none", "--no-flip", "--steps=1e3", "--sample-prompts", "none"]
    )
    assert (cfg.method.beta, cfg.data.flip, cfg.optim.steps, cfg.model.model) == (None, False, 1000, "m")
    assert notes == []


def test_a_negative_number_is_a_value():
    assert parse([*BASE, "--workers", "-1"])[0].data.workers == -1


def test_bools_take_a_value_after_an_equals_sign():
    assert parse([*BASE, "--flip=true"])[0].data.flip is True
    assert parse([*BASE, "--tensorboard=yes", "--tensorboard=no"])[0].output.tensorboard is False
    with pytest.raises(UserError, match="true or false"):
        parse([*BASE, "--flip=perhaps"])


def test_of_a_flag_given_twice_the_last_holds_and_the_log_says_so():
    cfg, notes = parse([*BASE, "--steps", "5", "--steps=7"])
    assert cfg.optim.steps == 7 and notes == ["--steps is given 2 times: the last one holds, 7"]
    cfg, notes = parse([*BASE, "--flip", "--no_flip"])
    assert not cfg.data.flip and notes == ["--flip is given 2 times: the last one holds, no"]
    assert parse([*BASE, "--steps", "5", "--steps", "5", "--no-flip", "--flip=false"])[1] == []


def test_nothing_at_all_is_the_embedded_world():
    cfg, notes = parse([])
    assert cfg == from_mapping(load_preset("tiny")) and notes == []
    assert cfg.model.model is None and cfg.data.data is None
    assert parse(["--steps", "3"])[0] == change(cfg, steps=3)
    assert parse(BASE)[0] == change(Config(), **PAIRED)


def test_resume_and_overwrite_beat_each_other_in_a_preset():
    assert parse([])[0].output.overwrite
    cfg, _ = parse(["--resume", "latest"])
    assert cfg.output.resume == "latest" and not cfg.output.overwrite
    assert parse([*BASE, "--compat", "sf", "--overwrite"])[0].output.resume is None


def test_a_preset_or_file_replaces_what_is_in_its_own_folder_only(tmp_path):
    assert parse(["--preset", "tiny"])[0].output.overwrite
    assert not parse(["--preset", "tiny", "--output", str(tmp_path)])[0].output.overwrite
    assert parse(["--preset", "tiny", "--output", str(tmp_path), "--overwrite"])[0].output.overwrite
    (tmp_path / "config.toml").write_text(to_toml(change(parse([])[0], output=str(tmp_path))))
    assert parse(["--config", str(tmp_path / "config.toml")])[0].output.overwrite
    assert not parse(["--config", str(tmp_path / "config.toml"), "--output", "elsewhere"])[0].output.overwrite


def test_a_config_of_a_run_says_not_how_that_began(tmp_path):
    """As earlier versions wrote it: it would delete the run that it is of, or go on from where that had."""
    file = tmp_path / "config.toml"
    for words in (["--overwrite"], ["--resume", "elsewhere/step-00000001"]):
        file.write_text(to_toml(parse([*BASE, "--output", str(tmp_path), *words])[0]))
        (tmp_path / "metrics.jsonl").unlink(missing_ok=True)
        begun = parse(["--config", str(file)])[0].output
        assert begun.overwrite or begun.resume
        (tmp_path / "metrics.jsonl").write_text("{}\n")
        again = parse(["--config", str(file)])[0].output
        assert not again.overwrite and again.resume is None
        assert parse(["--config", str(file), "--overwrite"])[0].output.overwrite
        assert parse(["--config", str(file), "--resume", "latest"])[0].output.resume == "latest"


def test_a_run_with_a_name_has_its_folder_under_runs(tmp_path):
    folder = lambda *argv: parse([*argv, "--run-name", "red foxes"])[0].output.output  # noqa: E731
    assert folder(*BASE) == folder("--preset", "sd15") == "runs/red foxes"
    assert folder(*BASE, "--output", "elsewhere") == "elsewhere", "a folder that is named is kept"
    (tmp_path / "own.toml").write_text(to_toml(change(parse(BASE)[0], output="mine")))
    assert folder("--config", str(tmp_path / "own.toml")) == "mine"
    assert not parse(["--run-name", "foxes"])[0].output.overwrite, "a preset's overwrite is for its own folder"


def test_a_resumed_run_brings_its_settings(tmp_path):
    saved = from_mapping(
        {**PAIRED, "beta": 7.0, "device": "cuda", "overwrite": True, "output": str(tmp_path), "steps": 10}
    )
    (tmp_path / "config.toml").write_text(to_toml(saved))
    for resume in ("latest", str(tmp_path / "checkpoints" / "step-4")):
        cfg, notes = parse(["--output", str(tmp_path), "--resume", resume, "--steps", "20"])
        assert cfg == change(saved, overwrite=False, device="auto", resume=resume, steps=20, effective_batch=4)
        assert len(notes) == 1 and "config.toml" in notes[0]
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.toml").write_text("steps = = 3")
    with pytest.raises(UserError, match=r"^settings of the run to continue, .*broken/config.toml: not TOML"):
        parse(["--output", str(tmp_path / "broken"), "--resume", "latest"])
    whole, notes = parse([*BASE, "--output", str(tmp_path), "--resume", "latest"])
    assert whole.method.beta is None and notes == [], "a whole command line is taken as it stands"
    for flags in (
        ["--output", str(tmp_path / "new"), "--resume", "latest"],
        ["--resume", str(tmp_path / "a" / "b" / "new")],
    ):
        with pytest.raises(UserError, match="new holds no run; correct the folder"):
            parse(flags)
    assert parse([*BASE, "--output", str(tmp_path / "new"), "--resume", "latest"])[0].output.resume == "latest"


@pytest.mark.parametrize("moved", ["data", "model"])
def test_a_resumed_run_whose_pairs_or_model_have_moved_keeps_its_other_settings(tmp_path, moved):
    saved = from_mapping({**PAIRED, "beta": 7.0, "learning_rate": 3e-6, "output": str(tmp_path), "steps": 10})
    (tmp_path / "config.toml").write_text(to_toml(saved))
    cfg, notes = parse(["--output", str(tmp_path), "--resume", "latest", f"--{moved}", "elsewhere"])
    assert cfg == change(saved, resume="latest", effective_batch=4, **{moved: "elsewhere"})
    assert len(notes) == 1 and "config.toml" in notes[0]
    with pytest.raises(UserError, match="new holds no run; correct the folder"):
        parse(["--output", str(tmp_path / "new"), "--resume", "latest", f"--{moved}", "elsewhere"])
    for start in (["--preset", "sd15"], ["--config", str(tmp_path / "config.toml")]):
        notes = parse([*start, "--output", str(tmp_path), "--resume", "latest", f"--{moved}", "elsewhere"])[1]
        assert not any("is continued" in note for note in notes), "what is named is the start"


def test_the_families_are_those_of_the_registry():
    from dpo.models.family import families

    assert specs()["family"].meta["choices"] == ("auto", *families())


SDXL = ("sdxl-lora-12gb", "sdxl-lora-24gb")
FLOWS = {  # presets of flow matching -> family
    "sd35-medium-lora": "sd3",
    "flux-dev-lora": "flux",
    "flux2-klein-4b": "flux2",
    "qwen-image-lora": "qwen",
}
OWN = (
    "sd15-lora-8gb",
    *SDXL,
    "sd35-medium-lora",
    "flux-dev-lora",
    "qwen-image-lora",
)  # presets for the user's own pairs
OWN_PAIRS = ["--data", "my.csv"]


@pytest.mark.parametrize("name", OWN)
def test_a_preset_for_ones_own_pairs_asks_for_them_and_keeps_its_hands_off_how_they_are_read(name):
    with pytest.raises(UserError, match="^no pairs to train on: give --data"):
        parse(["--preset", name])
    cfg, notes = parse(["--preset", name, *OWN_PAIRS])
    assert cfg.data == change(Config(), model="m", data="my.csv").data and notes == []
    text = Path(__file__).parents[3].joinpath("dpo", "settings", "presets", f"{name}.toml").read_text("utf-8")
    (line,) = [line for line in text.splitlines() if "python -m dpo.train" in line]
    said, _ = parse(line.split("dpo.train")[1].split())
    assert change(said, data="my.csv", output=cfg.output.output) == cfg


def test_sdxl_trains_the_same_on_12_and_on_24_gb():
    """The two presets differ in what a pass holds alone, so that their runs do not differ."""
    small, large = (flatten(parse(["--preset", name, *OWN_PAIRS])[0]) for name in SDXL)
    assert {key for key in small if small[key] != large[key]} == {"batch_size", "vae_batch", "output"}


def test_every_preset_parses_resolves_and_trains():
    assert {
        "sd15",
        "sd15-lora",
        "sd15-dde",
        "sd15-sft",
        "sd21",
        "sdxl",
        "sdxl-lora",
        "sdxl-dde",
        "sdxl-turbo",
        "sd15-pickscore",
        "sdxl-pickscore",
        "sdxl-24gb",
        "sdxl-16gb",
        "sd15-12gb",
        "sd15-lora-8gb",
        "sdxl-lora-12gb",
        "sdxl-lora-24gb",
        *FLOWS,
        "dde-study",
        "smoke",
        "tiny",
    } == set(presets())
    for name, title in presets().items():
        cfg, notes = parse(["--preset", name, *(OWN_PAIRS if name in OWN else [])])
        few = ["2 pairs an update is few for full fine-tuning"] if name == "sdxl-16gb" else []  # and is said
        assert [warning.split(" (")[0] for warning in warnings(cfg)] == few
        assert notes == [] and title.endswith("?" if name == "smoke" else ".")
        assert (cfg.model.model is None) == (name in ("smoke", "tiny"))
        facts = ModelFacts("sdxl" if "sdxl" in name else "sd", "epsilon", turbo="turbo" in name)
        if name in FLOWS:
            facts = ModelFacts(FLOWS[name], "flow_prediction", text_tokens=512)
        decided, _ = resolve(cfg, facts, DeviceFacts("cpu"))
        assert "pairs an update" in headline(decided) and len(warnings(decided)) == len(few)
        published = {"sd15": 2048, "sd21": 2048, "sdxl": 2048, "sd15-lora": 32, "sdxl-lora": 16}
        published |= {"sdxl-24gb": 2048, "sd15-12gb": 2048, "sdxl-16gb": 2} | dict.fromkeys(OWN, 8)
        assert cfg.optim.pairs == published.get(name, cfg.optim.pairs)


KLEIN = "flux2-klein-4b"
SMALL = [name for name in presets() if name.endswith("gb") and name not in OWN] + [KLEIN]


@pytest.mark.parametrize("name", SMALL)
def test_a_preset_for_a_small_gpu_names_the_command_that_makes_its_store(name):
    """The command in its comments prepares the folder that it reads, with the settings that it trains with."""
    text = Path(__file__).parents[3].joinpath("dpo", "settings", "presets", f"{name}.toml").read_text("utf-8")
    (line,) = [line for line in text.splitlines() if "python -m dpo.prepare" in line]
    own, rest = prepare.make_parser().parse_known_args(line.split("dpo.prepare")[1].split())
    made, trained = flatten(prepare._config(Path(own.store), rest)), flatten(parse(["--preset", name])[0])
    pairs, more = "liuhuohuo2/pick-a-pic-v2", {"validation_data", "validation_split"}
    if name == KLEIN:
        pairs, more = "my-pairs/", set()
    assert own.reference and own.store == trained["data"] and made["data"] == pairs
    assert {key for key in made if made[key] != trained[key]} == {"data"} | more
    assert (trained["precision"], trained["reference"]) == ("bf16-pure", "recorded")


def test_print_config_shows_the_result_and_exits(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--preset", "sdxl", "--steps", "9", "--rank", "3", "--print-config"])
    shown_text = capsys.readouterr().out
    assert caught.value.code == 0 and "# --rank" in shown_text
    assert from_mapping(tomllib.loads(shown_text)) == parse(["--preset", "sdxl", "--steps", "9", "--rank", "3"])[0]


def test_help_has_every_setting_with_its_default(capsys):
    with pytest.raises(SystemExit) as caught:
        parse(["--help"])
    text = capsys.readouterr().out
    assert caught.value.code == 0 and text == help_text()
    flat = " ".join(text.split())
    for spec in specs().values():
        assert f" {spec.flag}" in text
        assert " ".join(help_of(spec).replace("%%", "%").split()) in flat
        assert f"(default: {shown(spec.default)})" in help_of(spec)
        assert f"[{spec.meta['unit']}]" in help_of(spec) or not spec.meta["unit"]
    assert not any(f"--{name.replace('_', '-')} " in text for name in FOREIGN)
    assert all(name in flat for name in presets())
    assert "with the settings of --preset tiny and not the defaults shown here: --print-config" in " ".join(
        text.split()
    )


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--lerning-rate", "1"], "did you mean --learning-rate?"),
        (["--lerning_rate=1"], "--lerning-rate: did you mean --learning-rate?"),
        (["--zzzz"], "--help lists them all"),
        (["--snr-gamma", "5"], "unknown flag --snr-gamma: --help lists them all"),  # --gamma is another thing
        (["--gradient_checkpoint"], "--gradient-checkpointing"),
        (["hello"], "unexpected 'hello': every value follows a flag"),
        (
            ["--keep-best", "off"],
            "'off': --keep-best takes no value, so write --keep-best alone; --no-keep-best is its",
        ),
        (["--steps", "1", "--lora", "true"], "'true': --lora takes no value, so write --lora alone; --no-lora is"),
        (["--no_flip", "no"], "'no': --no-flip takes no value, so write --no-flip alone"),
        (["--print-config", "x"], "'x': --print-config takes no value, so write --print-config alone"),
        (["--steps"], "expected one argument"),
        (["--steps", "soon"], "steps = soon: expected a whole number (updates) at least 1 or none"),
        (["--steps", "-3"], "at least 1"),
        (["--step", "3"], "--steps"),
        (["--preset", "sd14"], "expected one of dde-study, flux-dev-lora, "),
        (["--preset", "sd15", "--config", "x.toml"], "give one"),
        (["--config", "/no/such.toml"], "No such file"),
        (["--compat", "kohya"], "hf-sd15, hf-sdxl, sf"),
        (["--model", "m"], "--data"),
        (["--data", "d"], "--model"),
        ([*BASE, "--loss", "cpo"], "sigmoid, hinge, ipo"),
    ],
)
def test_mistakes_are_one_line(argv, words):
    with pytest.raises(UserError) as caught:
        parse(argv)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_bad_config_files_are_told(tmp_path):
    for text, words in (
        ("a = ", "not TOML"),
        ("a = " + "[" * 100_000, "not TOML"),
        ("steps = " + "9" * 6000, "not TOML"),
        ("[optim]\nstep = 3", "did you mean steps?"),
        ("train_batch_size = 3", "batch_size"),
    ):
        path = tmp_path / "bad.toml"
        path.write_text(text)
        with pytest.raises(UserError, match=words.replace("?", r"\?")):
            parse(["--config", str(path)])
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not TOML"):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("flags", "name", "why"),
    [
        (["--rho", "0.5"], "--rho", "method dpo"),
        (["--weight-cap", "5"], "--weight-cap", "method dpo"),
        (["--gamma", "0.9", "--method", "dde"], "--gamma", "method dde"),
        (["--beta", "5", "--method", "sft"], "--beta", "method sft"),
        (["--alpha", "5"], "--alpha", "--lora"),
        (["--eps", "1e-6", "--optimizer", "adafactor"], "--eps", "adafactor"),
        (["--hub-id", "a/b"], "--hub-id", "--push-to-hub"),
    ],
)
def test_flags_without_effect_are_said(flags, name, why):
    _, notes = parse([*BASE, *flags])
    assert len(notes) == 1 and name in notes[0] and "no effect" in notes[0] and why in notes[0]


def test_flags_with_effect_are_not_remarked_upon():
    flags = [
        "--method",
        "dde",
        "--rho",
        "0.9",
        "--weight-cap",
        "100",
        "--lora",
        "--rank",
        "4",
        "--push-to-hub",
        "--hub-id",
        "a/b",
    ]
    assert parse([*BASE, *flags])[1] == []


def test_presets_name_only_settings_that_differ_or_matter():
    for entry in Path(__file__).parents[3].joinpath("dpo", "settings", "presets").glob("*.toml"):
        assert set(flatten(from_mapping(tomllib.loads(entry.read_text())))) == set(specs())


def flag_list() -> str:
    """Every flag of train and of prepare: its spellings, what it takes, and its default."""
    settings = {spec.flag: spec for spec in specs().values()}
    lines = ["# python -m dpo.train"]
    for words, takes, action in _shown_flags(make_parser()):
        spec = settings.get(action.option_strings[0])
        aliases = [f"--{alias}" for alias in spec.meta["aliases"]] if spec else []
        lines.append(f"{' '.join([*words, *aliases])}  {takes}  default: {shown(spec.default) if spec else 'none'}")
    lines.append("# python -m dpo.prepare")
    for words, takes, action in _shown_flags(prepare.make_parser()):
        lines.append(f"{' '.join(words)}  {takes}  default: {shown(action.default)}")
    return "\n".join(lines) + "\n"


def _shown_flags(parser):
    """(spellings, what it takes, action) of the flags that --help shows."""
    for action in parser._actions:
        if action.help != argparse.SUPPRESS and action.option_strings != ["-h", "--help"]:
            takes = "switch" if action.nargs == 0 else "|".join(action.choices) if action.choices else action.metavar
            yield action.option_strings, takes + (" ..." if action.nargs in ("+", "*") else ""), action


def test_a_file_that_begins_with_a_mark_of_its_byte_order(tmp_path):
    file = tmp_path / "c.toml"
    file.write_text("\ufeff[optim]\nsteps = 3\n", encoding="utf-8")
    assert load_config(str(file)) == {"optim": {"steps": 3}}


def test_no_flag_and_no_default_has_changed():
    assert flag_list() == FROZEN.read_text("utf-8"), (
        "a flag changed: see the top of this file for how to write the list anew"
    )


def test_a_presets_validation_can_be_switched_off():
    """Whatever a preset sets can be unset on the command line."""
    config, _ = parse(["--preset", "sd15", "--validation-data", "none", "--validation-fraction", "0"])
    assert config.data.validation_data is None and config.data.validation_fraction == 0.0
    assert parse(["--preset", "sd15"])[0].data.validation_data is not None


def test_the_last_word_on_how_large_an_update_is(tmp_path):
    file = tmp_path / "own.toml"
    file.write_text("[optim]\naccumulation = 3\n")
    sized = lambda *words: (parse(list(words))[0].optim.effective_batch, parse(list(words))[0].optim.accumulation)  # noqa: E731
    assert sized("--preset", "sd15") == (2048, 1)  # passes follow once the processes are known
    assert sized("--preset", "sd15", "--batch-size", "8") == (2048, 1)
    assert sized("--preset", "sd15", "--accumulation", "4") == (None, 4)
    assert sized("--preset", "sd15", "--gradient_accumulation_steps", "4") == (None, 4)
    assert sized(*BASE, "--config", str(file)) == (None, 3)
    assert sized(*BASE, "--config", str(file), "--effective-batch", "12") == (12, 1)
    file.write_text("[optim]\nbatch_size = 2\naccumulation = 3\neffective_batch = 12\n")  # as a run writes them
    assert sized(*BASE, "--config", str(file)) == (12, 3)
    assert sized(*BASE, "--config", str(file), "--accumulation", "5") == (None, 5)
    with pytest.raises(UserError, match="--effective-batch and --accumulation"):
        parse([*BASE, "--effective-batch", "8", "--accumulation", "2"])


# --- what a program asks for ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, []),
        (
            {"preset": "sd15-lora", "data": Path("mine"), "rank": 4},
            ["--preset", "sd15-lora", "--data", "mine", "--rank", "4"],
        ),
        (
            {
                "model": "m",
                "data": "d",
                "steps": None,
                "epochs": 2.0,
                "flip": True,
                "sample_prompts": ["a fox", "a cup"],
            },
            [*BASE, "--steps", "none", "--epochs", "2", "--flip", "--sample-prompts", "a fox", "a cup"],
        ),
    ],
)
def test_settings_of_a_program_are_read_as_flags(settings, words):
    assert asked(settings) == parse(words)


def test_a_file_is_a_start_of_a_program_too(tmp_path):
    (tmp_path / "mine.toml").write_text(
        "[model]\nmodel = 'm'\n[data]\ndata = 'd'\n[optim]\nsteps = 7\n", encoding="utf-8"
    )
    config, _ = asked({"config": tmp_path / "mine.toml", "batch_size": 2})
    assert (config.optim.steps, config.optim.batch_size) == (7, 2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stepps": 3}, "unknown setting stepps: did you mean steps?"),
        ({"dataset_name": "d"}, "unknown setting dataset_name: it is called data here"),
        ({"batch_size": None}, "batch_size = none: expected a whole number"),
        ({"model": "m"}, "no pairs to train on"),
        ({"preset": "sd15", "config": "x.toml"}, "two starting points"),
    ],
)
def test_mistakes_of_a_program_are_told_in_one_line(settings, message):
    with pytest.raises(UserError) as told:
        asked(settings)
    assert message in str(told.value) and "\n" not in str(told.value)


if __name__ == "__main__":
    sys.stdout.write(flag_list())


def test_a_file_of_settings_that_is_no_regular_file_is_not_read(tmp_path):
    """A device has no end: reading it would fill the memory."""
    for place in filter(os.path.exists, ("/dev/zero", str(tmp_path))):  # Windows has no such device
        with pytest.raises(UserError, match=r"^--config .* is no regular file$"):
            load_config(place)


@pytest.mark.parametrize(
    ("words", "asked"), [([], False), (["--report_to", "tensorboard"], True), (["--tensorboard"], True)]
)
def test_a_tracker_that_no_one_named_is_left_out_where_it_is_not_installed(monkeypatch, words, asked):
    line = [*BASE, "--compat", "sf", *words]
    assert parse(line)[0].output.tensorboard is True
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    config, notes = parse(line)
    assert config.output.tensorboard is asked
    assert ["tensorboard" in note and "diffusion-dpo[tracking]" in note for note in notes].count(True) == (not asked)


def test_a_model_that_is_missing_names_the_one_in_the_package():
    with pytest.raises(
        UserError, match="^no model to align: give --model .*, or embedded: the small one in the package"
    ):
        parse(OWN_PAIRS)
