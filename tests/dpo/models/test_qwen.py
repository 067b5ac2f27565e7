"""dpo.models.qwen: captions, latents and the transformer's inputs are those of diffusers' own pipeline of Qwen-Image."""

import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import save_file

from dpo.models import lora, lora_files, qwen
from dpo.models.family import Model, TextEncoding
from dpo.models.load import load
from dpo.models.ready import cast
from dpo.models.save import save_lora
from dpo.pages.folder import ADAPTER_FILE
from tests.dpo.models.test_checks import QUANTISED, change, without_weights
from tests.dpo.models.test_lora import train
from tests.help.loading import refused

CAPTIONS = ["a red fox", "", "zwölf Füchse 狐狸 {}", "a very long way " * 12]


@pytest.fixture(scope="module")
def model(world) -> Model:
    return load(world("qwen-image"), text_tokens=64)


@pytest.fixture(scope="module")
def pipe(world):
    found = diffusers.QwenImagePipeline.from_pretrained(world("qwen-image"))
    found.set_progress_bar_config(disable=True)
    return found


def test_captions_encode_as_diffusers_does_to_the_bit_and_in_any_company(model, pipe):
    together = qwen.encode(model, CAPTIONS)
    assert together.hidden.shape == (4, 64, 16) and together.mask.dtype == torch.bool
    lengths = together.mask.sum(1).tolist()
    assert lengths[3] == 64 and 5 < lengths[0] < lengths[2] < 64, "one is cut, and the others differ"
    for i, caption in enumerate(CAPTIONS):
        with torch.no_grad():
            hidden, mask = pipe.encode_prompt(caption, max_sequence_length=64)
        assert mask is None and hidden.shape[1] == lengths[i]
        assert torch.equal(together.hidden[i, : lengths[i]], hidden[0])
        assert together.mask[i, : lengths[i]].all() and not together.hidden[i, lengths[i] :].any()
        alone = qwen.encode(model, [caption])
        assert torch.equal(alone.hidden[0], together.hidden[i]) and torch.equal(alone.mask[0], together.mask[i])
    with torch.no_grad():  # of several captions the pipeline pads in the encoder: the same up to rounding
        hidden, mask = pipe.encode_prompt(CAPTIONS, max_sequence_length=64)
    assert torch.equal(mask.bool(), together.mask[:, : mask.shape[1]])
    torch.testing.assert_close(hidden * mask[..., None], together.hidden[:, : mask.shape[1]], rtol=1e-4, atol=1e-5)


def test_captions_encode_in_half_precision_as_diffusers_does_to_the_bit(world):
    model = load(world("qwen-image"), text_tokens=64)
    cast(model, "bf16")
    pipe = diffusers.QwenImagePipeline.from_pretrained(world("qwen-image"), torch_dtype=torch.bfloat16)
    with torch.no_grad():
        hidden, _ = pipe.encode_prompt(CAPTIONS[3], max_sequence_length=64)
    assert torch.equal(qwen.encode(model, [CAPTIONS[3]]).hidden, hidden)


def test_what_is_dropped_is_what_the_pipeline_drops(pipe):
    assert pipe.prompt_template_encode == qwen.TEMPLATE and pipe.prompt_template_encode_start_idx == qwen.DROPPED
    assert pipe.tokenizer_max_length == qwen.LONGEST and pipe.default_sample_size == qwen.NATIVE


def test_a_plan_knows_the_shapes_of_an_encoding(model):
    for there, planned in zip(qwen.encode(model, ["a fox"]), qwen.blank(model), strict=True):
        assert (there is None) == (planned is None)
        assert there is None or (there.shape == planned.shape and there.dtype in (planned.dtype, torch.float32))


class Seen(Exception):
    """Carries what a transformer was called with."""


def called_with(transformer, call) -> dict:
    """The arguments of the first call of `transformer` that `call` makes."""

    def look(module, arguments, named):
        assert not arguments
        raise Seen(named)

    handle = transformer.register_forward_pre_hook(look, with_kwargs=True)
    try:
        call()
    except Seen as found:
        return found.args[0]
    finally:
        handle.remove()
    raise AssertionError("it was never called")


@pytest.mark.parametrize("size", [(64, 64), (32, 80)])
def test_the_transformer_gets_what_the_pipeline_gives_it(model, pipe, size):
    """But for the padding of captions, and for a mask where they have none."""
    height, width = size
    prompts = ["a red fox", "a house"]
    noise = torch.randn(2, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(1))
    packed = pipe._pack_latents(noise, 2, 4, *noise.shape[2:])
    options = {"height": height, "width": width, "num_inference_steps": 3, "latents": packed}
    theirs = called_with(pipe.transformer, lambda: pipe(prompts, max_sequence_length=64, **options))
    t = 1000 * theirs["timestep"]
    text = qwen.encode(model, prompts)
    ours = called_with(model.denoiser, lambda: qwen.predict(model.denoiser, noise, t, text, None))
    assert torch.equal(ours["hidden_states"], theirs["hidden_states"])
    assert torch.equal(ours["timestep"], theirs["timestep"]) and ours["img_shapes"] == theirs["img_shapes"]
    tokens = theirs["encoder_hidden_states"].shape[1]
    torch.testing.assert_close(
        ours["encoder_hidden_states"][:, :tokens], theirs["encoder_hidden_states"], rtol=1e-4, atol=1e-5
    )
    assert torch.equal(ours["encoder_hidden_states_mask"][:, :tokens], theirs["encoder_hidden_states_mask"].bool())
    assert not ours["encoder_hidden_states_mask"][:, tokens:].any() and not theirs["attention_kwargs"]
    assert theirs["guidance"] is None and not theirs["return_dict"] and not ours["return_dict"]
    assert ours.keys() == theirs.keys() - {"guidance", "attention_kwargs"}
    with torch.no_grad():
        found = qwen.predict(model.denoiser, noise, t, text, None)
        plain = pipe._unpack_latents(pipe.transformer(**theirs)[0], height, width, 4)[:, :, 0]
    torch.testing.assert_close(found, plain, rtol=1e-4, atol=1e-4)


def test_padding_and_company_change_nothing(model):
    """What the mask hides has no weight, whatever it holds and however long it is; and a row is its own."""
    generator = torch.Generator().manual_seed(2)
    x_t, t = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([700.0, 20.0])
    text = qwen.encode(model, ["a red fox", "a house"])

    def predict(hidden, mask, rows=slice(None)):
        with torch.no_grad():
            return qwen.predict(model.denoiser, x_t[rows], t[rows], TextEncoding(hidden[rows], mask=mask[rows]), None)

    found = predict(text.hidden, text.mask)
    noisy = torch.where(text.mask[..., None], text.hidden, torch.randn(text.hidden.shape, generator=generator))
    assert torch.equal(predict(noisy, text.mask), found)
    tokens = int(text.mask.sum(1).max())
    shorter = predict(text.hidden[:, :tokens], text.mask[:, :tokens])
    torch.testing.assert_close(shorter, found, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(predict(text.hidden, text.mask, slice(1, 2)), found[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(predict(noisy, torch.ones_like(text.mask)), found, atol=1e-2), "the mask does hide"


def test_latents_are_the_pipelines(model, pipe, world):
    generator = torch.Generator().manual_seed(3)
    pixels = torch.rand(2, 3, 64, 32, generator=generator) * 2 - 1
    of_images = diffusers.QwenImageImg2ImgPipeline(**pipe.components)
    with torch.no_grad():
        theirs = of_images._encode_vae_image(pixels[:, :, None], torch.Generator().manual_seed(4))[:, :, 0]
        mean, std = model.family.posterior(model.vae, pixels)
    assert mean.shape == std.shape == (2, 4, 16, 8) and model.geometry == (4, 4, 8, 512, None)
    noise = torch.randn((2, 4, 1, 16, 8), generator=torch.Generator().manual_seed(4))[:, :, 0]
    shift, scale = (torch.tensor(values).view(-1, 1, 1) for values in model.family.scaling(model.vae))
    torch.testing.assert_close((mean + std * noise - shift) * scale, theirs, rtol=1e-5, atol=1e-5)
    assert len(set(model.family.scaling(model.vae)[1])) == 4, "each channel has its own"


def test_the_published_vae_fits_the_trainer():
    """Its class's own defaults are what is published: 16 channels, a factor of 8, squares of 16 pixels."""
    with torch.device("meta"):
        vae = diffusers.AutoencoderKLQwenImage()
    shift, scale = qwen.scaling(vae)
    assert len(shift) == len(scale) == 16 and scale[0] == 1 / 2.8184 and shift[0] == -0.7571
    assert qwen.geometry({}, vae.config) == (16, 8, 16, 1024, None)


def test_a_saved_adapter_loads_in_the_pipeline_and_gives_the_trained_prediction(world, tmp_path):
    model, targets = load(world("qwen-image"), text_tokens=32), qwen.FAMILY.lora_targets
    layers = lora.add(model.denoiser, rank=4, alpha=6.0, target_modules=targets, dropout=0.0, seed=0)
    assert len(layers) == len(targets) * len(model.denoiser.transformer_blocks)
    train(model.denoiser)
    save_lora(model, model.denoiser, tmp_path / "out", layout="diffusers")
    pipe = diffusers.QwenImagePipeline.from_pretrained(world("qwen-image"))
    text, x_t = qwen.encode(model, ["a fox"]), torch.ones(1, 4, 8, 8)

    def predict(module):
        with torch.no_grad():
            return qwen.predict(module, x_t, torch.tensor([500.0]), text, None)

    before = predict(pipe.transformer)
    pipe.load_lora_weights(tmp_path / "out", weight_name="pytorch_lora_weights.safetensors")
    pipe.transformer.eval()
    assert (predict(pipe.transformer) - before).abs().max() > 1e-2
    torch.testing.assert_close(predict(pipe.transformer), predict(model.denoiser), rtol=1e-4, atol=1e-5)

    fresh, own = load(world("qwen-image")), lora.adapter_of(model.denoiser)
    read = lora_files.read(tmp_path / "out" / ADAPTER_FILE, fresh.denoiser, fresh.family)
    assert read.keys() == own.keys()
    for name, factors in own.items():
        assert torch.equal(read[name].baked().down, factors.baked().down), name
        assert torch.equal(read[name].baked().up, factors.baked().up), name


LAYERS = (
    "transformer_blocks.1.attn.add_k_proj",
    "transformer_blocks.0.attn.to_out.0",
    "transformer_blocks.0.img_mlp.net.2",
)
NAMES = {  # of a layer, and of the factors, in files of other programs
    "diffusers": ("transformer.{}", "lora_A", "lora_B"),
    "ComfyUI": ("diffusion_model.{}", "lora_A", "lora_B"),
    "Lightning": ("{}", "lora_down", "lora_up"),
    "DiffSynth": ("{}", "lora_A.default", "lora_B.default"),
}


@pytest.mark.parametrize(("stem", "down", "up"), NAMES.values(), ids=NAMES)
def test_files_of_other_programs_are_read(model, tmp_path, stem, down, up):
    named, expected = {}, {}
    for layer in LAYERS:
        weight = model.denoiser.get_parameter(f"{layer}.weight")
        factors = torch.randn(4, weight.shape[1]), torch.randn(weight.shape[0], 4)
        expected[layer] = factors[1] @ factors[0]
        name = stem.format(layer)
        named |= {f"{name}.{down}.weight": factors[0], f"{name}.{up}.weight": factors[1]}
        if down == "lora_down":
            named[f"{name}.alpha"] = torch.tensor(2.0)
            expected[layer] = expected[layer] * 2 / 4
    save_file(named, tmp_path / "other.safetensors")
    read = lora_files.read(tmp_path / "other.safetensors", model.denoiser, model.family)
    assert read.keys() == expected.keys()
    for layer, factors in read.items():
        baked = factors.baked()
        torch.testing.assert_close(baked.up @ baked.down, expected[layer])


TRANSFORMER, VAE, TEXT = "transformer/config.json", "vae/config.json", "text_encoder/config.json"
CONFIGS = {
    "edit plus": (TRANSFORMER, {"zero_cond_t": True}, "an image-editing model"),
    "layered": (TRANSFORMER, {"use_additional_t_cond": True}, "a layered model takes an image"),
    "layered places": (TRANSFORMER, {"use_layer3d_rope": True}, "a layered model gives several images"),
    "layered VAE": (VAE, {"input_channels": 4}, "input_channels 4: 3 is expected"),
    "guidance": (TRANSFORMER, {"guidance_embeds": True}, "takes its guidance scale as an input"),
    "channels": (
        TRANSFORMER,
        {"in_channels": 64},
        "tokens of 64 numbers and gives 16, but two by two latents of the VAE are 16",
    ),
    "patches": (TRANSFORMER, {"patch_size": 1}, "patch_size 1: 2 is expected"),
    "text": (TRANSFORMER, {"joint_attention_dim": 3584}, "takes text of width 3584, but text_encoder gives 16"),
    "no spread": (VAE, {"latents_std": [1.0, 1.0, 0.0, 1.0]}, "no latents_std with 4 numbers above 0"),
    "unsaid spread": (VAE, {"latents_std": None}, "no latents_std"),
    "places": (TRANSFORMER, {"axes_dims_rope": [16, 56, 56]}, "axes_dims_rope [16, 56, 56]"),
    "short mean": (VAE, {"latents_mean": [0.0]}, "no latents_mean with 4 numbers, one for each channel"),
    "quantised": (TRANSFORMER, QUANTISED, "the transformer's weights are quantised"),
    "edit pipeline": ("model_index.json", {"_class_name": "QwenImageEditPlusPipeline"}, "an image-editing model"),
    "layered pipeline": ("model_index.json", {"_class_name": "QwenImageLayeredPipeline"}, "a layered model"),
}


@pytest.mark.parametrize(("file", "changes", "words"), CONFIGS.values(), ids=CONFIGS)
def test_what_the_step_does_not_fit_is_refused_in_one_line(world, tmp_path, file, changes, words):
    folder = Path(shutil.copytree(world("qwen-image"), tmp_path / "qwen"))
    change(folder / file, **changes)
    message = refused(without_weights(folder))
    assert words in message and "\n" not in message
