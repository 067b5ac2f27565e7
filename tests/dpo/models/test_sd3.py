"""dpo.models.sd3: what Stable Diffusion 3's pipeline in diffusers does, done here."""

import diffusers
import pytest
import torch

from dpo.common.errors import UserError
from dpo.models.load import load
from tests.dpo.models.test_checks import change
from tests.help.flow import make_flow

KINDS = ("sd3", "sd3-no-t5", "sd35")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {kind: make_flow(tmp_path_factory.mktemp("sd3") / kind, kind) for kind in KINDS}


def pipeline(folder, kind):
    without = {"text_encoder_3": None, "tokenizer_3": None} if kind == "sd3-no-t5" else {}
    pipe = diffusers.StableDiffusion3Pipeline.from_pretrained(folder, **without)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [None, 128])
def test_captions_encode_as_diffusers_does(folders, kind, tokens):
    model = load(str(folders[kind]), text_tokens=tokens)
    captions = ["a lamp in rain", "", "a red fox " * 40]
    text = model.family.encode(model, captions)
    with torch.no_grad():
        hidden, _, pooled, _ = pipeline(folders[kind], kind).encode_prompt(
            captions, None, None, do_classifier_free_guidance=False, max_sequence_length=tokens or 256
        )
    assert torch.equal(text.hidden, hidden) and torch.equal(text.pooled, pooled) and text.mask is None
    shapes = model.family.flow.blank(model)
    assert shapes.hidden.shape[1:] == hidden.shape[1:] and shapes.pooled.shape[1:] == pooled.shape[1:]


@pytest.mark.long
@pytest.mark.parametrize("kind", KINDS)
def test_the_transformer_is_asked_as_by_its_pipeline(folders, kind, monkeypatch):
    """A step of sampling: the same latents at the same noise level give the same prediction, and the VAE's latents
    decode to the image that they were encoded from as far as its own do.
    """
    model, pipe = load(str(folders[kind])), pipeline(folders[kind], kind)
    calls = []
    forward = pipe.transformer.forward
    monkeypatch.setattr(
        pipe.transformer, "forward", lambda **named: calls.append((named, forward(**named))) or calls[-1][1]
    )
    pipe("a fox", num_inference_steps=2, guidance_scale=0.0, height=64, width=64, output_type="latent")
    text = model.family.encode(model, ["a fox"])
    for asked, (given,) in calls:
        with torch.no_grad():
            own = model.family.predict(model.denoiser, asked["hidden_states"], asked["timestep"], text, None)
        assert torch.equal(own, given)
    assert len(calls) == 2


def test_latents_are_those_of_its_pipeline(folders):
    model = load(str(folders["sd3"]))
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = model.family.posterior(model.vae, pixels)
        shift, scale = (torch.tensor(x).view(1, -1, 1, 1) for x in model.family.scaling(model.vae))
        found = model.vae.encode(pixels).latent_dist
    config = model.vae.config
    torch.testing.assert_close((mean - shift) * scale, (found.mean - config.shift_factor) * config.scaling_factor)
    assert torch.equal(std, found.std) and mean.shape[1] == model.geometry.channels


@pytest.mark.parametrize(
    ("part", "changes", "said"),
    [
        ("transformer", {"pooled_projection_dim": 40}, "takes 40 numbers for pooled text, but is given 56"),
        ("transformer", {"joint_attention_dim": 72}, "takes text of width 72, but T5 gives 64"),
        ("transformer", {"in_channels": 8}, "takes 8 channels and gives 4, but the latents of the VAE have 4"),
        ("vae", {"shift_factor": "x"}, "shift_factor"),
        ("scheduler", {"_class_name": "DDIMScheduler"}, "a model of flow matching is trained with"),
    ],
)
def test_a_folder_that_cannot_be_trained_is_one_line(tmp_path, part, changes, said):
    folder = make_flow(tmp_path / "m", "sd3")
    name = "scheduler_config.json" if part == "scheduler" else "config.json"
    change(folder / part / name, **changes)
    with pytest.raises(UserError, match=said) as caught:
        load(str(folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
def test_a_tokenizer_without_words_is_refused(tmp_path, name):
    """transformers makes one that gives all captions the same tokens."""
    folder = make_flow(tmp_path / "m", "sd3")
    for file in ("tokenizer.json", "vocab.json"):
        (folder / name / file).unlink(missing_ok=True)
    with pytest.raises(UserError, match=f"{name} has no tokenizer.json or vocab.json"):
        load(str(folder))


def test_a_model_that_is_named_turbo_must_be_said_to_be(tmp_path):
    folder = make_flow(tmp_path / "sd3-turbo", "sd3")
    with pytest.raises(UserError, match="--timesteps turbo if it was distilled"):
        load(str(folder))
    assert not load(str(folder), timesteps="all").turbo
