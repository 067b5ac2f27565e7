"""dpo.models.family: what each family makes of captions and sizes, and what tells one from another."""

import diffusers
import pytest
import torch

from dpo.models.family import TextEncoding, families
from dpo.models.load import load
from dpo.settings.families import FAMILIES
from tests.help.flow import TRAINED
from tests.help.worlds import KINDS


def test_every_family_is_told_apart():
    found = families()
    assert tuple(found) == FAMILIES and [family.name for family in found.values()] == list(FAMILIES)
    assert len({family.pipeline for family in found.values()}) == len(found)
    keys = [family.single_file_key for family in found.values() if family.single_file_key]
    assert len(set(keys)) == len(keys)
    for family in found.values():
        assert hasattr(diffusers, family.pipeline) and len(family.tokenizers) == len(family.text_encoders)


def test_an_encoding_is_moved_and_doubled_whole():
    one = TextEncoding(torch.tensor([[[1.0]], [[2.0]]]), torch.tensor([[3.0], [4.0]]))
    assert one.twice().hidden.flatten().tolist() == [1, 2, 1, 2] and one.twice().pooled.flatten().tolist() == [
        3,
        4,
        3,
        4,
    ]
    assert {x.dtype for x in one.to("cpu", torch.float64)[:2]} == {torch.float64}
    assert TextEncoding(one.hidden).twice().pooled is None and TextEncoding(one.hidden).to("cpu").pooled is None


def test_a_mask_stays_a_mask():
    one = TextEncoding(torch.ones(2, 3, 1), None, torch.tensor([[True, True, False], [True, False, False]]))
    half = one.to("cpu", torch.bfloat16)
    assert half.hidden.dtype == torch.bfloat16 and half.mask.dtype == torch.bool and half.pooled is None
    assert one.twice().mask.sum(1).tolist() == [2, 1, 2, 1] and one.row(slice(1, 2)).mask.sum(1).tolist() == [1]
    assert one.zero_where(torch.tensor([True, False])).mask.sum(1).tolist() == [0, 1]


@pytest.mark.parametrize("kind", ["sd15", *TRAINED])
def test_latents_are_decoded_as_they_were_encoded(world, kind):
    model = load(world(kind))
    pixels = torch.rand(2, 3, 64, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        mean, std = model.family.posterior(model.vae, pixels)
        found = model.family.decode(model.vae, mean)
        frames = pixels[:, :, None] if kind == "qwen-image" else pixels
        plain = model.vae.decode(model.vae.encode(frames).latent_dist.mode()).sample
    shape, scale = model.geometry, model.geometry.vae_scale
    assert mean.shape == std.shape == (2, shape.channels, 64 // scale, 32 // scale)
    assert found.shape == pixels.shape and torch.equal(found, plain.view(found.shape))


@pytest.mark.parametrize("kind", KINDS)
def test_captions_become_conditioning(pipelines, kind):
    model = load(str(pipelines[kind]))
    text = model.family.encode(model, ["a fox", "", "a fox"])
    assert text.hidden.shape == (3, 77, model.denoiser.config.cross_attention_dim)
    assert torch.equal(text.hidden[0], text.hidden[2]) and not torch.equal(text.hidden[0], text.hidden[1])
    micro = torch.tensor([[32, 32, 0, 0, 32, 32]] * 6)
    with torch.no_grad():
        both = text.twice()
        out = model.family.predict(model.denoiser, torch.zeros(6, 4, 8, 8), torch.tensor([7] * 6), both, micro)
    assert out.shape == (6, 4, 8, 8) and torch.equal(both.hidden[:3], both.hidden[3:])
    if kind.startswith("sdxl"):
        with pytest.raises(ValueError, match="micro-conditioning"):
            model.family.predict(model.denoiser, torch.zeros(3, 4, 8, 8), torch.tensor([7] * 3), text, None)


@pytest.mark.long
def test_captions_encode_as_diffusers_does(pipelines):
    import diffusers

    for kind in ("sd15", "sdxl"):
        model = load(str(pipelines[kind]))
        pipe = diffusers.DiffusionPipeline.from_pretrained(pipelines[kind])
        result = pipe.encode_prompt(
            "a lamp in rain", device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        text = model.family.encode(model, ["a lamp in rain"])
        torch.testing.assert_close(text.hidden, result[0])
        if kind == "sdxl":
            torch.testing.assert_close(text.pooled, result[2])


def test_sizes_keep_their_last_digit_in_half_precision(pipelines):
    """bf16 has 8 bits: it would make 764 of 765."""
    model = load(str(pipelines["sdxl"]))
    seen = {}
    model.denoiser.forward = lambda *args, **named: seen.update(named) or (torch.zeros(1),)
    text = TextEncoding(torch.zeros(1, 77, 48), torch.zeros(1, 24)).to("cpu", torch.bfloat16)
    sizes = torch.tensor([[765, 765, 0, 0, 765, 765]])
    model.family.predict(model.denoiser, torch.zeros(1, 4, 8, 8), torch.tensor([7]), text, sizes)
    assert torch.equal(seen["added_cond_kwargs"]["time_ids"], sizes.float())
