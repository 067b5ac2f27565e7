"""dpo.settings.rules: what does not go together, what has no effect, and what may change on resume."""

import pytest

from dpo.common.errors import UserError
from dpo.methods import METHODS
from dpo.settings.config import Config, change, flatten, from_mapping, specs
from dpo.settings.rules import contradictions, lora_goes_on, resume_changes, without_effect
from tests.dpo.settings.test_resolve import decide


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"window_low": 500, "window_high": 500}, "below"),
        ({"label_smoothing": 0.5}, "nothing to learn"),
        ({"validation_fraction": 0.1, "validation_data": "v"}, "give one"),
        ({"resolution": 513}, "multiple of 8"),
        ({"method": "sft", "loss": "ipo"}, "sft"),
        ({"method": "sft", "sft_weight": 1.0}, "sft"),
        ({"method": "sft", "label_smoothing": 0.1}, "sft"),
        ({"norm_penalty": 1.0, "method": "sft"}, "method sft does not have"),
        (
            {"norm_penalty": 1.0, "reference": "recorded"},
            "recorded errors do not have: leave it at 0, or use --reference auto",
        ),
        ({"target_gradient_factor": 0.2, "loss": "ipo"}, "this is ipo"),
        ({"target_gradient_factor": 0.2, "method": "sft"}, "this is sft"),
        ({"method": "kto", "kto_center": "batch", "accumulation": 2}, "an update must be one pass"),
        ({"method": "kto", "kto_center": "batch", "buckets": True}, "no --buckets"),
        ({"method": "kto", "loss": "ipo"}, "with method kto"),
        ({"method": "kto", "kto_liked_weight": 0.0, "kto_disliked_weight": 0.0}, "both 0"),
        ({"liked_column": "a", "chosen_column": "b"}, "those of one kind"),
        ({"loss_alpha": 0.1}, "loss = sigmoid has no constant"),
        ({"loss": "robust", "loss_alpha": 0.5}, "loss_alpha = 0.5: with loss robust, share of labels"),
        ({"loss": "robust", "label_smoothing": 0.1}, "give one"),
        ({"loss": "smpo", "label_smoothing": 0.1}, "leave --label-smoothing at 0"),
        ({"method": "sft", "reference": "recorded"}, "no reference"),
        ({"reference": "adapter"}, "--lora"),
        ({"reference": "adapter", "lora": True, "unet_init": "u", "reference_model": "base"}, "--reference copy"),
        ({"precision": "fp64", "optimizer": "adamw8bit"}, "adamw"),
        ({"checkpointing": "some"}, "down_blocks.0"),
        ({"device": "gpu"}, "cuda:N"),
        ({"device": "cpu", "kernels": "triton"}, "needs a GPU"),
        ({"resume": "latest", "overwrite": True}, "give one"),
        ({"gradient_release": True, "accumulation": 2}, "--accumulation 1"),
        ({"gradient_release": True, "effective_batch": 8}, "effective_batch = 8 with batch_size = 4 cannot be"),
        ({"gradient_release": True, "optimizer": "adafactor"}, "adamw8bit or adamw"),
        ({"gradient_release": True, "precision": "fp16"}, "bf16-pure"),
        ({"activation_offload": True, "compile": True}, "--compile"),
        ({"keep_encoded": "on", "crop": "random"}, "cuts another in each epoch"),
        ({"sharding": "on", "lora": True}, "--sharding off"),
        ({"sharding": "on", "optimizer": "lion8bit"}, "adamw or adamw8bit"),
        ({"sharding": "on", "optimizer": "adafactor"}, "adamw or adamw8bit"),
        ({"sharding": "on", "precision": "fp16"}, "bf16-pure"),
        ({"sharding": "on", "compile": True}, "--compile"),
        ({"sharding": "on", "gradient_release": True}, "gradient_release"),
        ({"sharding": "on", "activation_offload": True}, "--activation-offload"),
        ({"keep_best": True, "validate_every": 0}, "makes none"),
        ({"keep_best": True, "validation_fraction": 0.0}, "holds no pairs out"),
        ({"run_name": "a/b"}, "it names a folder"),
        ({"run_name": ".."}, "it names a folder"),
        ({"run_name": "fox "}, "it names a folder"),
        ({"steps": 5, "epochs": 1.0}, "give one"),
        ({"cuda_graph": True, "device": "cpu"}, "needs a GPU"),
        ({"cuda_graph": True, "gradient_release": True}, "--gradient-release"),
        ({"cuda_graph": True, "activation_offload": True}, "--activation-offload"),
        ({"cuda_graph": True, "precision": "fp16"}, "--precision bf16"),
        ({"cuda_graph": True, "compile": True}, "--compile"),
        ({"cuda_graph": True, "sharding": "on"}, "--sharding"),
    ],
)
def test_bad_combinations_are_refused_in_one_line(values, words):
    with pytest.raises(UserError) as caught:
        from_mapping(values)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_the_first_contradiction_is_what_a_person_is_told():
    values = flatten(Config()) | {
        "method": "sft",
        "loss": "ipo",
        "sft_weight": 1.0,
        "resume": "latest",
        "overwrite": True,
    }
    found = contradictions(values)
    assert len(found) == 3 and "loss = ipo" in found[0] and "sft_weight" in found[1] and "--overwrite" in found[2]
    assert contradictions(flatten(Config())) == []


@pytest.mark.parametrize("method", METHODS)
def test_a_setting_that_the_method_does_not_read_has_no_effect(method):
    given = ["rho", "sigma2", "kappa", "weight_cap", "gamma", "beta", "loss", "safeguard"]
    idle = {
        line.split()[0][2:].replace("-", "_")
        for line in without_effect(flatten(change(Config(), method=method)), given, specs())
        if line.endswith(f" has no effect with method {method}")
    }
    assert idle == set(given) - METHODS[method].settings


def test_what_has_no_effect_is_said_in_the_order_of_the_settings():
    values = flatten(change(Config(), steps=5))
    assert without_effect(values, {"alpha", "rank", "gamma", "steps"}, specs()) == [
        "--rank has no effect without --lora",
        "--alpha has no effect without --lora",
        "--gamma has no effect with method dpo",
    ]
    assert without_effect(values, (), specs()) == []


@pytest.mark.parametrize(
    ("values", "on"),
    [
        ({"lora": True, "lora_init": "x"}, False),
        ({"lora": True, "lora_init": "x", "reference_model": "base"}, True),
        ({"lora": True, "lora_init": "x", "method": "sft"}, True),
        ({"lora_init": "x", "reference_model": "base"}, False),
        ({"lora": True, "reference_model": "base"}, False),
    ],
)
def test_where_a_lora_goes_on_and_decides_the_shape_of_the_adapter(values, on):
    """Merged, it leaves --rank to the fresh adapter; going on, it is the adapter."""
    values = flatten(change(Config(), **values))
    assert lora_goes_on(values["lora"], values["lora_init"], values["reference_model"], values["method"]) is on
    lines = without_effect(values, {"rank", "alpha", "target_modules"}, specs())
    because = "has no effect because the adapter of --lora-init goes on"
    assert lines == ([f"{flag} {because}" for flag in ("--rank", "--alpha", "--target-modules")] if on else lines)
    assert on or not any("--lora-init" in line for line in lines)


RESUME = [
    ({"workers": 3}, "free"),
    ({"steps": 4000}, "free"),
    ({"checkpoint_every": 7}, "free"),
    ({"steps": 4000, "scheduler": "cosine"}, "said"),
    ({"learning_rate": 2e-5}, "said"),
    ({"beta": 10.0}, "said"),
    ({"sharding": "on"}, "said"),
    ({"precision": "bf16"}, "said"),
    ({"precision": "bf16-pure", "optimizer": "adamw8bit"}, "refused"),
    ({"seed": 1}, "refused"),
    ({"method": "dde"}, "refused"),
    ({"ties": "keep"}, "refused"),
    ({"ema": 0.99}, "refused"),
    ({"optimizer": "adafactor"}, "refused"),
    ({"lora": True}, "refused"),
    ({"rank": 3, "alpha": 3.0}, "free"),
]


def changed(old, **values):
    """What is said of a run that resumes `old` with these settings changed."""
    return resume_changes(flatten(old), flatten(change(old, **values)), specs())


@pytest.mark.parametrize(("values", "rule"), RESUME)
def test_changes_on_resume(values, rule):
    old, _ = decide()
    allowed, refused = changed(old, **values)
    assert (bool(allowed), bool(refused)) == (rule == "said", rule == "refused")
    assert changed(old) == ([], [])


def test_changed_rank_of_a_lora_run_is_refused_and_named():
    old, _ = decide({"lora": True})
    _, refused = changed(old, rank=16)
    assert refused == ["rank 8 -> 16"]


def test_a_changed_decay_of_the_averaged_weights_is_said_when_both_have_them():
    old, _ = decide({"ema": 0.9})
    assert changed(old, ema=0.99) == (["ema 0.9 -> 0.99"], [])
    assert changed(old, ema=0.0) == ([], ["ema 0.9 -> 0"])
