"""The settings: one definition, read back exactly from every form, checked on the way in."""

import dataclasses
import math
import subprocess
import sys
import tomllib

import pytest
import torch

from csrc_triton.philox import Stream, random_bits
from dpo.common.errors import UserError
from dpo.settings.config import (
    SEEDS,
    Config,
    change,
    flatten,
    from_mapping,
    groups,
    of_before,
    specs,
    to_toml,
    validate,
)
from dpo.settings.fields import coerce

PAIRED = {"model": "m", "data": "d"}
SPECIAL = {
    "checkpointing": "down_blocks.0,mid_block",
    "device": "cuda:1",
    "resolution": 768,
    "window_high": 900,
    "run_name": "red füxe, no. 2",  # names a folder
}


def another(name):
    """A valid value of this setting that is not its default."""
    spec = specs()[name]
    if name in SPECIAL:
        return SPECIAL[name]
    if spec.many:
        return (
            ("a man, a dog", "x")
            if spec.kind is str and not spec.meta["separator"]
            else ("b", "c")
            if spec.kind is str
            else (3, 4)
        )
    if spec.kind is bool:
        return not spec.default
    if spec.meta["choices"]:
        return next(choice for choice in spec.meta["choices"] if choice != spec.default)
    if spec.kind is str:
        return "some 'quoted\" ü path\\n"
    return coerce(spec, max(spec.meta["low"] or 0, 0) + (7 if spec.kind is int else 0.123456789))


def altered(name):
    """The default configuration with one setting changed, and what must go with it."""
    values = {name: another(name)}
    if name in PAIRED:
        values = PAIRED | values
    if name == "reference":
        values["reference"] = "recorded"
    if name == "loss_alpha":
        values["loss"] = "robust"
    if name == "run_name":  # otherwise it names the folder as well
        values["output"] = Config().output.output
    return change(Config(), **values), values


def test_names_are_unique_documented_and_frozen():
    assert len(specs()) == sum(len(dataclasses.fields(cls)) for cls in groups().values())
    aliases = [alias for spec in specs().values() for alias in spec.meta["aliases"]]
    assert len(aliases) == len(set(aliases)) and not set(aliases) & set(specs())
    for spec in specs().values():
        assert spec.meta["help"] and "\n" not in spec.meta["help"] and len(spec.meta["help"]) < 125
        assert spec.meta["resume"] in ("free", "said", "refused")
        assert coerce(spec, spec.default) == spec.default
        assert not spec.optional or spec.default is None, "an unset setting must be the default: TOML has no null"
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().optim.steps = 3


@pytest.mark.parametrize("name", list(specs()))
def test_every_setting_survives_toml_and_mapping(name):
    cfg, values = altered(name)
    assert flatten(cfg) == flatten(Config()) | values
    for comments in (True, False):
        assert from_mapping(tomllib.loads(to_toml(cfg, comments))) == cfg
    assert from_mapping(flatten(cfg)) == cfg


def test_a_dropped_caption_of_before_was_the_empty_one():
    before = of_before({"steps": 3, "batch_size": 2, "accumulation": 8})
    assert before == {
        "seed": 0,
        "steps": 3,
        "dropped_caption": "empty",
        "batch_size": 2,
        "accumulation": 8,
        "effective_batch": 16,
    }
    assert of_before({"dropped_caption": "zeros"})["dropped_caption"] == "zeros"


def test_toml_is_grouped_and_explains_itself():
    text = to_toml(Config())
    assert list(tomllib.loads(text)) == list(groups())
    assert all(spec.meta["help"] in text for spec in specs().values())
    assert "# beta =" in text
    assert "#" not in to_toml(Config(), comments=False)


@pytest.mark.parametrize(
    ("mapping", "words"),
    [
        ({"optim": {"learning_rat": 1}}, "learning_rate"),
        ({"train_batch_size": 1}, "batch_size"),
        ({"qqqq": 1}, "--help"),
        ({"optim": {"model": "x"}}, "belongs to [model]"),
        ({"steps": 3, "optim": {"steps": 4}}, "twice"),
        ({"steps": 2.5}, "a whole number (updates) at least 1"),
        ({"steps": True}, "whole number"),
        ({"steps": 0}, "at least 1"),
        ({"flip": "maybe"}, "true or false"),
        ({"flip": 2}, "true or false"),
        ({"learning_rate": "nan"}, "a number"),
        ({"learning_rate": 0}, "above 0"),
        ({"output": ""}, "text"),
        (
            {"method": "dd"},
            "one of dpo, discounted, dde-single, dde-step, dde, sdpo, kto, mapo, sft (did you mean dde?)",
        ),
        ({"loss": "cpo"}, "one of sigmoid, hinge, ipo"),
        ({"sample_seeds": 3}, "expected a list"),
        ({"sample_seeds": [1, "x"]}, "whole number"),
        ({"caption_dropout": 1.5}, "at most 1"),
        ({"sample_seeds": [10**26]}, "at least -9223372036854775808 and at most 18446744073709551615"),
        ({"beta": 10**400}, "a number"),
        ({"method": "d" + "9" * 6000}, "... (6001 in all): one of dpo"),
        ({"method": "a\nb"}, "method = a\\nb: one of dpo"),
        ({"model": "a\0b"}, "a character that no file or text has"),
        ({"sample_prompts": ["a \ud800 fox"]}, "a character that no file or text has"),
        ({"seed": 2**32}, "seed = 4294967296: expected a whole number at least 0 and at most 4294967295"),
    ],
)
def test_bad_values_are_refused_in_one_line(mapping, words):
    with pytest.raises(UserError) as caught:
        from_mapping(mapping)
    assert words in str(caught.value) and "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_seed_of_a_sample_is_one_that_torch_takes():
    for seed in (-(2**63), 2**64 - 1):
        torch.Generator().manual_seed(from_mapping({"sample_seeds": [seed]}).output.sample_seeds[0])


def test_seeds_are_those_that_keyed_numbers_tell_apart():
    """The counter of a keyed number has 32 bits of the seed; a larger one would give the run of its remainder."""
    assert from_mapping({"seed": SEEDS - 1}).runtime.seed == 2**32 - 1
    keys, draws = torch.tensor([5]), torch.tensor([0])
    bits = [random_bits(keys, draws, Stream.NOISE, seed, 4) for seed in (7, SEEDS + 7, SEEDS - 1)]
    assert torch.equal(bits[0], bits[1]) and not torch.equal(bits[0], bits[2])
    assert of_before({"seed": SEEDS + 7, "steps": 3})["seed"] == 7, "a run of before goes on"


def test_a_config_built_in_python_is_checked_too():
    cfg = Config()
    validate(cfg)
    with pytest.raises(UserError, match="steps"):
        validate(dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, steps=-1)))
    with pytest.raises(UserError, match="a number"):
        validate(dataclasses.replace(cfg, optim=dataclasses.replace(cfg.optim, learning_rate=math.inf)))


def test_the_command_line_starts_without_torch():
    code = "import sys; from dpo.settings import advice, flags, resolve; flags.parse([]); print(*{'torch', 'numpy'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
