"""dpo.settings.resolve: every "auto" decided from the model and the device."""

import pytest

from dpo.common.errors import UserError
from dpo.methods import METHODS
from dpo.settings.config import Config, change, flatten, from_mapping
from dpo.settings.resolve import DeviceFacts, ModelFacts, dealt, large_weight, learning_rate, resolve, total_steps

SDXL = {"family": "sdxl", "beta": 5000.0, "guidance": 5.0, "native_resolution": 1024}


def decide(values=(), *, device="cpu", bf16=True, **facts):
    """What is decided of these settings for a model of these facts (of Stable Diffusion 1.5 where none is given)."""
    model = ModelFacts(**{"family": "sd", "prediction_type": "epsilon"} | facts)
    return resolve(from_mapping(dict(values)), model, DeviceFacts(device, bf16))


def test_resolve_leaves_nothing_open_and_is_stable():
    cfg, notes = decide()
    open_ones = {name for name, value in flatten(cfg).items() if value == "auto"}
    of_data, of_model = {"data_format", "validation_by"}, {"zero_snr", "vae_precision"}
    assert open_ones == of_data | of_model, "these are read from the pairs, from the model's schedule and its family"
    assert (cfg.data.resolution, cfg.runtime.precision, cfg.optim.optimizer, cfg.optim.steps) == (
        512,
        "fp32",
        "adamw",
        2000,
    )
    assert (cfg.lora.alpha, cfg.method.window_high, cfg.output.sample_steps, cfg.output.sample_guidance) == (
        8.0,
        1000,
        50,
        7.5,
    )
    assert len(notes) == 1 and "beta 2000" in notes[0]
    assert decide(flatten(cfg)) == (cfg, [])


@pytest.mark.parametrize(
    ("asked", "empty_is_zeros", "trained", "words"),
    [
        ("auto", True, "zeros", "train zeros: diffusers samples this model without a negative prompt with zeros"),
        ("zeros", True, "zeros", "--dropped-caption empty trains the encoding"),
        ("empty", True, "empty", 'train the encoding of "", but diffusers samples'),
        ("auto", False, "empty", 'train the encoding of "": diffusers samples'),
        ("zeros", False, "zeros", "train zeros, but diffusers samples"),
    ],
)
def test_what_a_dropped_caption_of_sdxl_becomes_and_what_the_log_says(asked, empty_is_zeros, trained, words):
    facts = SDXL | {"empty_is_zeros": empty_is_zeros}
    cfg, notes = decide({"caption_dropout": 0.1, "dropped_caption": asked}, **facts)
    assert cfg.data.dropped_caption == trained and words in notes[-1]
    cfg, notes = decide({"dropped_caption": asked}, **facts)
    assert cfg.data.dropped_caption == trained and not any("dropped" in note for note in notes), "nothing is dropped"


def test_dropped_captions_of_other_models_are_the_empty_one():
    cfg, notes = decide({"caption_dropout": 0.1})
    assert cfg.data.dropped_caption == "empty" and not any("dropped" in note for note in notes)
    with pytest.raises(UserError, match="--dropped-caption zeros: only SDXL"):
        decide({"caption_dropout": 0.1, "dropped_caption": "zeros"})


@pytest.mark.parametrize(
    ("values", "facts", "beta"),
    [
        ({}, {}, 2000),
        ({"method": "discounted"}, {}, 2000),
        ({"method": "dde-step"}, {}, 2000),
        ({"method": "dde"}, {}, 200),
        ({"method": "dde-single"}, SDXL, 500),
        ({"method": "dde"}, {"prediction_type": "v_prediction"}, 2000),
        ({}, SDXL, 5000),
        ({"beta": 17.0}, SDXL, 17),
    ],
)
def test_default_beta(values, facts, beta):
    assert decide(values, **facts)[0].method.beta == beta


def test_resolve_on_a_gpu_for_turbo_and_for_lora():
    cfg, _ = decide({"lora": True, "rank": 4}, device="cuda", turbo=True, **(SDXL | {"native_resolution": 512}))
    assert (cfg.model.timesteps, cfg.output.sample_steps, cfg.output.sample_guidance) == ("turbo", 4, 0.0)
    assert (cfg.runtime.precision, cfg.runtime.reference, cfg.lora.alpha) == ("bf16", "adapter", 4.0)
    assert cfg.runtime.channels_last == "on" and cfg.optim.optimizer in ("adamw8bit", "adamw")
    assert decide(device="cuda", bf16=False)[0].runtime.precision == "fp16"
    both = {"lora": True, "unet_init": "u", "reference_model": "base"}
    assert decide(both)[0].runtime.reference == "copy"
    fallback, notes = decide({"precision": "fp16"})
    assert fallback.runtime.precision == "fp32" and any("fp16" in note for note in notes)


def test_a_prediction_type_that_is_asked_for_beats_the_models():
    cfg, _ = decide({"prediction_type": "v_prediction", "method": "dde"})
    assert (cfg.model.prediction_type, cfg.method.beta) == ("v_prediction", 2000.0)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_activations_leave_a_gpu_alone(device):
    config, notes = decide({"activation_offload": True}, device=device)
    assert config.runtime.activation_offload == (device == "cuda")
    assert any("activation_offload has no effect on a CPU" in note for note in notes) == (device == "cpu")


def test_gradient_release_is_for_one_process():
    config = from_mapping({"gradient_release": True})
    assert dealt(config, 1).optim.gradient_release
    with pytest.raises(UserError, match="before the gradients of 2 processes are summed: leave it out"):
        dealt(config, 2)


def test_a_cuda_graph_is_for_one_process_and_a_gpu():
    config = from_mapping({"cuda_graph": True})
    assert dealt(config, 1).runtime.cuda_graph and decide({"cuda_graph": True}, device="cuda")[0].runtime.cuda_graph
    for refused, words in (
        (lambda: dealt(config, 2), "--cuda-graph is for one process"),
        (lambda: decide({"cuda_graph": True}), "--cuda-graph needs a GPU, and there is none here"),
        (lambda: decide({"cuda_graph": True}, device="cuda", bf16=False), "use --precision fp32"),
    ):
        with pytest.raises(UserError, match=words):
            refused()


def test_lion_has_its_own_betas_unless_they_are_given():
    cfg, notes = decide({"optimizer": "lion8bit"})
    assert cfg.optim.betas == (0.9, 0.99) and any("lion8bit: betas 0.9 and 0.99" in note for note in notes)
    for values in ({"optimizer": "lion8bit", "adam_beta2": 0.999}, {"optimizer": "adamw"}, {}):
        cfg, notes = decide(values)
        assert cfg.optim.betas == (0.9, 0.999) and not any("lion8bit" in note for note in notes)


def test_what_is_said_of_turbo_s_last_timestep_is_what_is_done():
    assert "at 999 both images are the same noise" in decide(turbo=True, **SDXL)[1][-1]
    for values in ({"zero_snr": "off"}, {"prediction_type": "v_prediction"}):
        assert decide(values, turbo=True, **SDXL)[1][-1] == "Turbo: timesteps 249, 499, 749 and 999"


def test_resolve_refuses_what_the_model_or_device_cannot_do():
    for values, words in (({"family": "sdxl"}, "family sd"), ({"kernels": "triton"}, "GPU")):
        with pytest.raises(UserError, match=words):
            decide(values)
    with pytest.raises(UserError, match="100 timesteps"):
        decide({"window_high": 200}, num_timesteps=100)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_triton_the_plain_path_runs_and_that_is_said_once(device):
    facts = ModelFacts("sd", "epsilon"), DeviceFacts(device, triton=False)
    config, notes = resolve(Config(), *facts)
    assert config.runtime.kernels == "torch"
    assert [note for note in notes if "triton" in note] == ["triton is not installed: everything runs on plain torch"]
    assert not any("not installed" in note for note in resolve(Config(), facts[0], DeviceFacts(device))[1])


@pytest.mark.parametrize(
    ("values", "words"), [({"kernels": "triton"}, "--kernels torch"), ({"compile": True}, "--compile")]
)
def test_what_needs_triton_is_refused_without_it(values, words):
    asked = from_mapping(values)
    resolve(asked, ModelFacts("sd", "epsilon"), DeviceFacts("cuda"))
    with pytest.raises(UserError, match="the package triton.* is not installed") as caught:
        resolve(asked, ModelFacts("sd", "epsilon"), DeviceFacts("cuda", triton=False))
    assert words in str(caught.value)


def test_length_and_rate():
    cfg = from_mapping(
        {"batch_size": 4, "accumulation": 8, "epochs": 2.0, "learning_rate": 1e-8, "scale_lr": True, "beta": 2000.0}
    )
    assert total_steps(cfg, pairs=100) == 7 and total_steps(dealt(cfg, 2), pairs=100) == 4
    assert total_steps(change(cfg, epochs=1.1, batch_size=1, accumulation=1), pairs=100) == 110
    assert total_steps(change(cfg, steps=5, epochs=None), pairs=100) == 5 and total_steps(Config(), pairs=9) == 2000
    assert learning_rate(cfg) == pytest.approx(3.2e-7) and learning_rate(dealt(cfg, 2)) == pytest.approx(6.4e-7)


def test_the_weight_of_single_shot_estimation_is_large_on_the_epsilon_error_alone():
    assert {name for name in METHODS if large_weight(name, "epsilon")} == {"dde", "dde-single"}
    assert not any(large_weight(name, "v_prediction") for name in METHODS)


@pytest.mark.parametrize(
    ("there", "words"), [(True, "needs a GPU: use"), (False, "needs a GPU and the package triton")]
)
def test_all_that_the_kernels_lack_is_named(there, words):
    asked = change(Config(), kernels="triton")
    with pytest.raises(UserError, match=words):
        resolve(asked, ModelFacts("sd", "epsilon"), DeviceFacts("cpu", triton=there))


@pytest.mark.parametrize(
    "values, kept",
    [({}, "on"), ({"keep_encoded": "off"}, "off"), ({"crop": "random"}, "off"), ({"data_format": "store"}, "off")],
)
def test_encoded_pairs_are_kept_where_each_epoch_has_the_same(values, kept):
    assert decide(values)[0].runtime.keep_encoded == kept


@pytest.mark.parametrize("asked", ["on", "auto"])
def test_keeping_what_a_store_has_is_said_to_have_no_effect(asked):
    _, notes = decide({"keep_encoded": asked, "data_format": "store"})
    assert any("keep_encoded has no effect with a prepared store" in note for note in notes) == (asked == "on")


def test_the_pairs_of_an_update_decide_the_passes_of_each_process():
    published = from_mapping({"batch_size": 16, "effective_batch": 2048})
    for processes, passes in ((1, 128), (8, 16), (64, 2)):
        found = dealt(published, processes).optim
        assert (found.batch_size, found.accumulation, found.effective_batch) == (16, passes, 2048)
    own = dealt(from_mapping({"batch_size": 4, "accumulation": 3}), 2)  # counted per process
    assert own.optim.effective_batch == own.optim.pairs == 24
    assert dealt(own, 1).optim.accumulation == 6  # a resumed run's is that of its settings


@pytest.mark.parametrize(
    ("values", "processes", "words"),
    [
        ((16, 2048), 6, ["6 x 16", "4 or 8 processes", "--batch-size", "--effective-batch 2016 or 2112"]),
        ((4, 6), 1, ["1 x 4", "--batch-size 2 or 3 or 6", "--effective-batch 4 or 8"]),
        ((4, 2), 2, ["2 x 4", "what fits is --batch-size 1, or --effective-batch 8"]),
        ((4, 7), 3, ["what fits is 1 or 7 processes with --batch-size 1, or --effective-batch 12"]),
        ((16, 208), 4, ["1 or 13 processes, --batch-size 4 or 13 or 26, or --effective-batch 192 or 256"]),
    ],
)
def test_pairs_that_cannot_be_dealt_out_are_refused_with_what_fits(values, processes, words):
    with pytest.raises(UserError) as caught:
        dealt(from_mapping(dict(zip(("batch_size", "effective_batch"), values))), processes)
    assert [word for word in words if word not in str(caught.value)] == [] and "\n" not in str(caught.value)


FLOW = {"family": "flux", "prediction_type": "flow_prediction", "side_factor": 16}


def test_a_side_that_a_flow_cannot_take_is_refused():
    with pytest.raises(
        UserError, match="--resolution 1000: the model takes sides that are multiples of 16: 992 or 1008"
    ):
        decide({"resolution": 1000}, **FLOW)
    assert decide({"resolution": 1008}, **FLOW)[0].data.resolution == 1008


@pytest.mark.parametrize(("told", "scale"), [(None, 0.0), (3.5, 3.5)])
def test_four_steps_have_no_guidance_but_what_the_model_is_told_in_training(told, scale):
    found, _ = decide({"timesteps": "turbo"}, train_guidance=told, **FLOW)
    assert (found.output.sample_steps, found.output.sample_guidance) == (4, scale)
