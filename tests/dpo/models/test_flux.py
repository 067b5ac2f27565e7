"""dpo.models.flux and flux2: captions, calls, latents, noise levels and adapters are those of diffusers' pipelines."""

import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, Flux2KleinPipeline, FluxImg2ImgPipeline
from diffusers.pipelines.flux2.pipeline_flux2_klein import compute_empirical_mu
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.models import lora, lora_files
from dpo.models.family import TextEncoding
from dpo.models.flux2 import shift
from dpo.models.load import load
from dpo.models.ready import HALF, cast, decide
from dpo.models.save import save_lora
from dpo.settings.config import Config, change
from dpo.settings.resolve import DeviceFacts
from tests.dpo.models.test_checks import change as rewrite
from tests.dpo.models.test_checks import without_weights
from tests.help.loading import refused

KINDS = ("flux-dev", "flux-schnell", "flux2-klein", "flux2-klein-base")
CAPTIONS = ["a red fox", "", "Ein Füchslein, 狐, in the snow " * 60]
SIDE = 32  # pixels


@pytest.fixture
def copies(world, tmp_path):
    return lambda kind: Path(shutil.copytree(world(kind), tmp_path / kind))


def pipeline_of(folder, dtype=torch.float32) -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtype)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@contextmanager
def calls_of(module):
    """Inside the block, the arguments of each call of `module`'s forward, and what it gave, are put into the list."""
    seen, forward = [], module.forward

    def spied(**arguments):
        seen.append((arguments, forward(**arguments)))
        return seen[-1][1]

    module.forward = spied
    try:
        yield seen
    finally:
        module.forward = forward


@pytest.mark.parametrize("kind", ["flux-dev", "flux2-klein"])
@pytest.mark.parametrize(("tokens", "precision"), [(16, "fp32"), (None, "fp32"), (None, "bf16")])
def test_captions_encode_as_the_pipeline_does(world, kind, tokens, precision):
    model = load(world(kind), text_tokens=tokens)
    cast(model, precision)
    pipe = pipeline_of(world(kind), HALF.get(precision, torch.float32))
    with torch.no_grad():
        text, found = (
            model.family.encode(model, CAPTIONS),
            pipe.encode_prompt(CAPTIONS, max_sequence_length=tokens or 512),
        )
    assert torch.equal(text.hidden, found[0]) and text.mask is None
    if text.pooled is None:
        assert len(found) == 2
    else:
        assert torch.equal(text.pooled, found[1])
    shapes = [None if x is None else x.shape[1:] for x in text]
    assert [None if x is None else x.shape[1:] for x in model.family.flow.blank(model)] == shapes
    assert not torch.equal(text.hidden[0], text.hidden[1])


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_is_called_as_the_pipeline_calls_it(world, kind):
    model, pipe = (
        load(world(kind), text_tokens=16, guidance=2.5 if kind == "flux-dev" else None),
        pipeline_of(world(kind)),
    )
    width = 2 * SIDE  # of images that are not square
    with calls_of(pipe.transformer) as theirs, torch.no_grad():
        pipe(
            prompt=CAPTIONS[:2],
            height=SIDE,
            width=width,
            num_inference_steps=2,
            guidance_scale=2.5 if kind == "flux-dev" else 1.0,
            max_sequence_length=16,
            output_type="latent",
        )
    arguments, (prediction,) = theirs[-1]
    scale, channels = model.geometry.vae_scale, model.geometry.channels
    high, wide = SIDE // scale, width // scale

    def unpacked(tokens):
        if kind.startswith("flux2"):
            return tokens.transpose(1, 2).reshape(2, channels, high, wide)
        return pipe._unpack_latents(tokens, SIDE, width, pipe.vae_scale_factor)

    text = TextEncoding(arguments["encoder_hidden_states"], arguments.get("pooled_projections"))
    with calls_of(model.denoiser) as ours, torch.no_grad():
        found = model.denoise(model.denoiser)(
            unpacked(arguments["hidden_states"]), 1000 * arguments["timestep"], text, None
        )
    for name, value in ours[0][0].items():
        wanted = arguments[name]
        if not isinstance(value, torch.Tensor):
            assert value == wanted, name
        elif name.endswith("_ids"):  # places: whole numbers, which the model makes floats of
            assert torch.equal(value.float(), (wanted[0] if wanted.dim() == 3 else wanted).float()), name
        else:
            torch.testing.assert_close(value, wanted, rtol=1e-7 if name == "timestep" else 0, atol=0)
    torch.testing.assert_close(found, unpacked(prediction), rtol=1e-5, atol=1e-5)
    assert found.shape == (2, channels, high, wide) and theirs[0][0]["timestep"][0] == 1.0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["flux-dev", "flux2-klein"])
def test_latents_are_those_of_the_pipeline(world, kind):
    model, pipe = load(world(kind)), pipeline_of(world(kind))
    pixels = torch.rand(2, 3, SIDE, 2 * SIDE, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = model.family.posterior(model.vae, pixels)
        theirs = pipe.vae.encode(pixels).latent_dist
        if kind == "flux-dev":
            rest = {
                name: pipe.components[name]
                for name in pipe.components
                if name not in ("image_encoder", "feature_extractor")
            }
            whole = FluxImg2ImgPipeline(**rest)._encode_vae_image(pixels, torch.Generator().manual_seed(1))
            sample = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(1))
        else:
            whole, sample = pipe._encode_vae_image(pixels, torch.Generator()), mean
            assert torch.equal(std, Flux2KleinPipeline._patchify_latents(theirs.std))
    shift_C, scale_C = (torch.tensor(values).view(-1, 1, 1) for values in model.family.scaling(model.vae))
    torch.testing.assert_close((sample - shift_C) * scale_C, whole, rtol=1e-5, atol=1e-5)
    shape = model.geometry
    assert mean.shape == (2, shape.channels, SIDE // shape.vae_scale, 2 * SIDE // shape.vae_scale)
    assert shape.native == 64 and shape.tokens(SIDE, SIDE) == (SIDE // 8) ** 2


def decided(folder, side, **settings):
    """The noise schedule that training takes at images of `side` pixels, and the lines that it logs."""
    model = load(folder, timesteps=settings.get("timesteps", "auto"))
    config = change(Config(), model=folder, resolution=side, **settings)
    _, plan, told = decide(config, model, DeviceFacts("cpu", bf16=True, triton=False))
    return plan, told


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "steps"), [("flux-schnell", 4), ("flux2-klein", 4), ("flux-dev", 4), ("flux2-klein-base", 50)]
)
def test_noise_levels_are_those_that_the_pipeline_samples_at(world, kind, steps):
    """A distilled model's own four; of the others those of a multiple of the steps lie in the grid of a thousand."""
    pipe = pipeline_of(world(kind))
    pipe(prompt="a", height=SIDE, width=SIDE, num_inference_steps=steps, max_sequence_length=8, output_type="latent")
    sampled = pipe.scheduler.sigmas[:-1].double().flip(0)
    plan, _ = decided(world(kind), SIDE)
    distilled = kind in ("flux-schnell", "flux2-klein")
    timesteps = plan.timesteps() if distilled else torch.arange(1, steps + 1) * (plan.length // steps) - 1
    assert len(timesteps) == steps and len(plan.timesteps()) == (4 if distilled else 1000)
    torch.testing.assert_close(plan.levels[timesteps], sampled, rtol=1e-6, atol=0)


def test_the_shift_of_klein_is_its_pipelines():
    for tokens in (16, 1024, 4096, 4300, 4301, 16384):
        for steps in (4, 50):
            assert shift({}, tokens, steps) == pytest.approx(compute_empirical_mu(tokens, steps), rel=1e-12)


def test_the_log_says_the_steps_of_kleins_shift(world):
    for kind, words in (("flux2-klein-base", "sampled in 50 steps"), ("flux2-klein", "sampled in 4 steps")):
        assert any(words in line for line in decided(world(kind), SIDE)[1])
    assert not any("sampled in" in line for line in decided(world("flux-dev"), SIDE)[1])


FEW = {
    "dev": ("flux-dev", {}, {}, False),
    "schnell": ("flux-schnell", {}, {}, True),
    "no guidance as an input, but dev's shift": ("flux-schnell", {"use_dynamic_shifting": True}, {}, False),
    "no guidance as an input, and a shift": ("flux-schnell", {"shift": 3.0}, {}, False),
    "klein": ("flux2-klein", {}, {}, True),
    "klein base": ("flux2-klein-base", {}, {}, False),
    "klein that says nothing": ("flux2-klein", {}, {"is_distilled": None}, False),
}


@pytest.mark.long
@pytest.mark.parametrize(("kind", "scheduler", "index", "few"), FEW.values(), ids=FEW)
def test_distilled_models_are_known_by_their_configs(copies, kind, scheduler, index, few):
    folder = copies(kind)
    rewrite(folder / "scheduler/scheduler_config.json", **scheduler)
    rewrite(folder / "model_index.json", **index)
    assert load(str(folder)).turbo is few
    plan, told = decided(str(folder), SIDE)
    assert (plan.chain is not None) is few
    assert any("--timesteps all" in line for line in told) is few  # what is only taken for one is no secret
    if few:
        assert decided(str(folder), SIDE, timesteps="all")[0].chain is None


TRANSFORMER, VAE, TEXT, INDEX = (
    "transformer/config.json",
    "vae/config.json",
    "text_encoder/config.json",
    "model_index.json",
)
REFUSED = {
    "Fill": ("flux-dev", TRANSFORMER, {"in_channels": 96}, "the model is FLUX.1 Fill"),
    "Depth": ("flux-dev", TRANSFORMER, {"in_channels": 32}, "the model is FLUX.1 Depth or Canny"),
    "Fill by its pipeline": ("flux-dev", INDEX, {"_class_name": "FluxFillPipeline"}, "it is FLUX.1 Fill"),
    "Depth by its pipeline": ("flux-dev", INDEX, {"_class_name": "FluxControlPipeline"}, "it is FLUX.1 Depth or Canny"),
    "Kontext": ("flux-dev", INDEX, {"_class_name": "FluxKontextPipeline"}, "it is FLUX.1 Kontext, for editing"),
    "klein KV": ("flux2-klein", INDEX, {"_class_name": "Flux2KleinKVPipeline"}, "it is FLUX.2 klein KV, for editing"),
    "FLUX.2 dev": ("flux2-klein", INDEX, {"_class_name": "Flux2Pipeline"}, "unknown model family 'Flux2Pipeline'"),
    "guidance in klein": ("flux2-klein", TRANSFORMER, {"guidance_embeds": True}, "its guidance scale as an input (FLUX.2 dev)"),
    "another VAE": ("flux-dev", VAE, {"latent_channels": 8}, "takes 16 channels and gives 16, but the packed latents of the VAE have 32"),
    "other outputs": ("flux2-klein", TRANSFORMER, {"out_channels": 8}, "takes 16 channels and gives 8"),
    "patches": ("flux-dev", TRANSFORMER, {"patch_size": 2}, "patch_size 2: 1 is expected"),
    "T5's width": ("flux-dev", "text_encoder_2/config.json", {"d_model": 64}, "width 40 (joint_attention_dim), but text_encoder_2 gives 64"),
    "CLIP's width": ("flux-dev", TEXT, {"hidden_size": 48}, "width 32 (pooled_projection_dim), but text_encoder gives 48"),
    "Qwen3's width": ("flux2-klein", TEXT, {"hidden_size": 24}, "width 48 (joint_attention_dim), but text_encoder gives 72"),
    "Qwen3's layers": ("flux2-klein", TEXT, {"num_hidden_layers": 12, "layer_types": None}, "has 12 layers"),
    "axes": ("flux-dev", TRANSFORMER, {"axes_dims_rope": [4, 4, 4, 4]}, "axes_dims_rope [4, 4, 4, 4]: 3 even numbers that sum to 16"),
    "no scale": ("flux-dev", VAE, {"scaling_factor": None}, "no scaling_factor"),
    "no shift": ("flux-dev", VAE, {"shift_factor": None}, "shift_factor None: a number above 0 is expected"),
    "no size": ("flux-dev", VAE, {"sample_size": None}, "no sample_size"),
    "statistics of other packs": ("flux2-klein", VAE, {"patch_size": [1, 1]}, "patch_size [1, 1]: [2, 2] is expected"),
    "a scheduler of betas": ("flux-dev", "scheduler/scheduler_config.json", {"_class_name": "DDIMScheduler"}, "FlowMatchEulerDiscreteScheduler"),
}  # fmt: skip


@pytest.mark.parametrize(("kind", "file", "changes", "words"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_before_weights_are_read(copies, kind, file, changes, words):
    folder = copies(kind)
    rewrite(folder / file, **changes)
    assert words in refused(without_weights(folder))


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        ("flux-schnell", {"guidance": 3.0}, "--train-guidance is for models that take their guidance as an input"),
        ("flux2-klein", {"guidance": 3.0}, "--train-guidance is for models that take their guidance as an input"),
        ("flux-dev", {"text_tokens": 600}, "--text-tokens 600: FluxPipeline takes captions of 512 at most"),
    ],
)
def test_settings_that_a_model_has_no_place_for(world, kind, options, words):
    assert words in refused(world(kind), **options)


def test_a_tokenizer_without_a_chat_template_is_refused_in_one_line(copies):
    folder = copies("flux2-klein")
    (folder / "tokenizer/chat_template.jinja").unlink()
    model = load(str(folder))
    with pytest.raises(UserError, match="chat template cannot be used") as caught:
        model.family.encode(model, ["a fox"])
    assert "\n" not in str(caught.value)


def test_another_vae_of_klein_is_read(world, copies):
    other = copies("flux2-klein-base") / "vae"
    (path,) = other.glob("*.safetensors")
    named = {name: value.clone() for name, value in load_file(path).items()}
    named["bn.running_mean"] += 1
    save_file(named, path, metadata={"format": "pt"})
    means = [
        model.family.scaling(model.vae)[0]
        for model in (load(world("flux2-klein")), load(world("flux2-klein"), vae=str(other)))
    ]
    assert means[1] == pytest.approx([mean + 1 for mean in means[0]])


SINGLE = "single_transformer_blocks"
LORA = {  # the layers that diffusers' scripts adapt: train_dreambooth_lora_flux.py, and ..._flux2_klein.py
    "flux-dev": {
        "transformer_blocks.0.attn": "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out",
        "transformer_blocks.0": "ff.net.0.proj ff.net.2 ff_context.net.0.proj ff_context.net.2",
        f"{SINGLE}.0.attn": "to_q to_k to_v",
        f"{SINGLE}.1.attn": "to_q to_k to_v",
    },
    "flux2-klein": {
        "transformer_blocks.0.attn": "to_q to_k to_v to_out.0",
        f"{SINGLE}.0.attn": "to_qkv_mlp_proj to_out",
        f"{SINGLE}.1.attn": "to_qkv_mlp_proj to_out",
    },
}


def adapted(folder, targets=None):
    """A loaded model with adapters that change what it predicts."""
    model = load(folder, text_tokens=16)
    targets = targets or model.family.lora_targets
    layers = lora.add(model.denoiser, rank=4, alpha=8.0, target_modules=targets, dropout=0.0, seed=0)
    draw = torch.Generator().manual_seed(0)
    for layer in layers:
        weight = layer.lora_B["default"].weight
        weight.data = 0.3 * torch.randn(weight.shape, generator=draw)
    return model


@torch.no_grad()
def predicted(model, denoiser):
    """The prediction for latents of noise."""
    shape = model.geometry
    x_t = torch.randn(2, shape.channels, *[SIDE // shape.vae_scale] * 2, generator=torch.Generator().manual_seed(1))
    text = model.family.encode(model, CAPTIONS[:2])
    return model.denoise(denoiser)(x_t, torch.tensor([300.0, 900.0]), text, None)


@pytest.mark.long
@pytest.mark.parametrize("kind", LORA)
def test_a_lora_has_the_layers_of_the_public_trainers_and_draws_in_the_pipeline(world, tmp_path, caplog, kind):
    with caplog.at_level("WARNING", "dpo"):
        model = adapted(world(kind))
    assert not caplog.records
    expected = {f"{block}.{name}" for block, names in LORA[kind].items() for name in names.split()}
    assert set(lora.adapter_of(model.denoiser)) == expected
    save_lora(model, model.denoiser, tmp_path, layout="diffusers")
    pipe = pipeline_of(world(kind))
    before = predicted(model, pipe.transformer)
    pipe.load_lora_weights(tmp_path, weight_name="pytorch_lora_weights.safetensors")
    trained = predicted(model, model.denoiser)
    torch.testing.assert_close(predicted(model, pipe.transformer), trained, rtol=1e-5, atol=1e-5)
    assert (trained - before).abs().max() > 0.1

    fresh = load(world(kind))
    read = lora_files.read(tmp_path / "pytorch_lora_weights.safetensors", fresh.denoiser, fresh.family)
    assert read.keys() == expected
    for name, factors in lora.adapter_of(model.denoiser).items():
        again, baked = read[name].baked(), factors.baked()
        assert torch.equal(again.down, baked.down) and torch.equal(again.up, baked.up)


@pytest.mark.parametrize("kind", LORA)
def test_a_file_with_an_alpha_for_each_layer_is_read_with_it(world, tmp_path, kind):
    model = load(world(kind))
    layer = f"{SINGLE}.1.attn.{'to_q' if kind == 'flux-dev' else 'to_out'}"
    weight = model.denoiser.get_parameter(f"{layer}.weight")
    down, up = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
    path = tmp_path / "other.safetensors"
    stem = f"transformer.{layer}"
    named = {f"{stem}.lora_A.weight": down, f"{stem}.lora_B.weight": up, f"{stem}.alpha": torch.tensor(2.0)}
    save_file(named, path)
    (read,) = lora_files.read(path, model.denoiser, model.family).items()
    assert read[0] == layer and read[1].alpha == 2.0
    assert torch.equal(read[1].down, down) and torch.equal(read[1].up, up)


def test_a_target_that_is_a_list_of_layers_elsewhere_is_spelt_out(world, caplog):
    with caplog.at_level("WARNING", "dpo"):
        model = adapted(world("flux2-klein"), ("attn.to_out",))
    assert set(lora.adapter_of(model.denoiser)) == {f"{SINGLE}.{i}.attn.to_out" for i in (0, 1)}
    assert [record.message for record in caplog.records] == [
        "adapters: none in 1 of 3 blocks, all of their kind (Flux2TransformerBlock): name layers of theirs in --target-modules"
    ]


def test_flux_dev_is_told_its_guidance(world):
    found = [
        predicted(model, model.denoiser) for model in (load(world("flux-dev"), guidance=g) for g in (None, 3.5, 1.0))
    ]
    assert torch.equal(found[0], found[1]) and (found[0] - found[2]).abs().max() > 1e-3
