"""dpo.drawing: images depend on prompt and seed alone, nothing else is disturbed, and a grid can be read back."""

import itertools

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw, ImageFont

from dpo.drawing import draw, grid
from dpo.drawing.draw import sample, tiled
from dpo.drawing.grid import read_grid, write_grid
from dpo.models.load import load
from dpo.models.pipeline import pipeline_of
from tests.help.worlds import make_pipeline

PROMPTS = ["a red thing", "a blue thing"]


@pytest.fixture(scope="module", params=["sd15", "sd2v", "sdxl", "sdxl-turbo"])
def model(request, tmp_path_factory):
    return load(str(make_pipeline(tmp_path_factory.mktemp("model"), request.param)))


def tasks(prompts, seeds):
    return list(itertools.product(prompts, seeds))


def arrays(images):
    return np.stack([np.asarray(image) for image in images])


def differ(images, others):
    return [not np.array_equal(a, b) for a, b in zip(arrays(images), arrays(others), strict=True)]


@pytest.mark.long
def test_an_image_depends_on_prompt_and_seed_alone(model):
    pipe = pipeline_of(model)
    settings = {"device": "cpu", "steps": 2, "guidance": 2.0}
    together = sample(pipe, tasks(PROMPTS, [3, 4]), **settings, batch=4)
    torch.rand(7)
    alone = sample(pipe, tasks(PROMPTS[1:], [4]), **settings, batch=1)
    assert together[0].size == (32, 32) and len(together) == 4
    assert np.abs(arrays(together[3:]).astype(int) - arrays(alone)).max() <= 1
    assert all(differ(together[:1] * 3, together[1:]))


def test_nothing_else_is_disturbed(model):
    pipe = pipeline_of(model)
    model.denoiser.train()
    model.denoiser.conv_out.eval()
    state, scheduler, weights = torch.get_rng_state(), pipe.scheduler, model.denoiser.conv_in.weight.clone()
    before = dict(scheduler.__dict__)
    sample(pipe, tasks(PROMPTS[:1], [0]), device="cpu", steps=2, guidance=2.0)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.denoiser.training and model.denoiser.mid_block.training and not model.denoiser.conv_out.training
    assert pipe.scheduler is scheduler and {k: v is before[k] for k, v in scheduler.__dict__.items()} == dict.fromkeys(
        before, True
    )
    assert torch.equal(model.denoiser.conv_in.weight, weights) and all(
        p.grad is None for p in model.denoiser.parameters()
    )
    model.denoiser.eval()


@pytest.mark.long
def test_policy_beside_reference(model, tmp_path):
    pipe = pipeline_of(model)
    before = sample(pipe, tasks(PROMPTS, [0]), device="cpu", steps=2, guidance=1.0)
    policy = type(model.denoiser).from_config(model.denoiser.config)
    policy.load_state_dict(model.denoiser.state_dict())
    pipe.unet = policy
    assert not any(differ(before, sample(pipe, tasks(PROMPTS, [0]), device="cpu", steps=2, guidance=1.0)))
    with torch.no_grad():
        policy.conv_out.bias += 0.5
    assert all(differ(before, sample(pipe, tasks(PROMPTS, [0]), device="cpu", steps=2, guidance=1.0)))


def test_interrupted_drawing_gives_everything_back(model, monkeypatch):
    pipe = pipeline_of(model)
    model.denoiser.train()
    scheduler = pipe.scheduler
    monkeypatch.setattr(model.denoiser, "forward", lambda *a, **k: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        sample(pipe, tasks(PROMPTS, [0]), device="cpu", steps=2, guidance=1.0)
    assert model.denoiser.training and pipe.scheduler is scheduler
    model.denoiser.eval()


def test_autocast_draws(model):
    (image,) = sample(
        pipeline_of(model), tasks(PROMPTS[:1], [0]), device="cpu", steps=2, guidance=2.0, autocast=torch.bfloat16
    )
    assert np.asarray(image).std() > 0


@pytest.mark.long
def test_where_memory_is_short_the_vae_works_in_tiles(model, monkeypatch):
    """An image no larger than a tile is the same bit for bit; a larger one nearly; the VAE is then as it was."""
    pipe = pipeline_of(model)
    settings = {"device": "cpu", "steps": 2, "guidance": 2.0, "batch": 1}
    usual = arrays(sample(pipe, tasks(PROMPTS[:1], [3, 4]), **settings))
    assert np.array_equal(usual, arrays(sample(pipe, tasks(PROMPTS[:1], [3, 4]), **settings, frugal=True)))
    tiles = []
    decode = model.vae.decoder.forward
    monkeypatch.setattr(model.vae.decoder, "forward", lambda z, *a: tiles.append(z.shape) or decode(z, *a))
    monkeypatch.setattr(draw, "TILE", 16)
    tiled = arrays(sample(pipe, tasks(PROMPTS[:1], [3, 4]), **settings | {"batch": 2}, frugal=True))
    assert max(shape[-1] for shape in tiles) == 4 and {shape[0] for shape in tiles} == {1}
    assert tiled.shape == usual.shape and np.abs(tiled.astype(int) - usual).mean() < 40
    vae = model.vae
    assert not vae.use_tiling and not vae.use_slicing
    assert (vae.tile_sample_min_size, vae.tile_latent_min_size) == (32, 8)


def small_vae(kind):
    """One of factor 8 whose own tiles are of 512 pixels, or of 256."""
    from diffusers import AutoencoderKL, AutoencoderKLQwenImage

    if kind == "qwen-image":
        return AutoencoderKLQwenImage(base_dim=4, z_dim=4, dim_mult=[1, 1, 1, 1], num_res_blocks=1)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    return AutoencoderKL(block_out_channels=(4,) * 4, **blocks, norm_num_groups=2, sample_size=512)


@pytest.mark.parametrize("kind", ["sd15", "qwen-image"])
@pytest.mark.parametrize("side", [256, 768])
def test_tiles_are_of_the_side_that_is_asked_for(kind, side):
    """Also where the VAE's own are smaller, and where it calls them otherwise."""
    vae = small_vae(kind)
    before = {name: value for name, value in vars(vae).items() if name.startswith(("tile_", "use_"))}
    tiles = []

    def decoded(z, *_, **__):
        tiles.append(z.shape[-2:])
        return torch.zeros(*z.shape[:1], 3, *z.shape[2:-2], z.shape[-2] * 8, z.shape[-1] * 8)

    vae.decoder.forward = decoded
    frames = [1] if kind == "qwen-image" else []
    with torch.no_grad(), tiled(vae, side):
        image = vae.decode(torch.zeros(2, 4, *frames, 100, 128)).sample
    whole = torch.Size([side // 8] * 2)
    assert whole in tiles and max(max(shape) for shape in tiles) == side // 8
    assert image.shape[-2:] == (800, 1024)
    assert {name: value for name, value in vars(vae).items() if name.startswith(("tile_", "use_"))} == before


def flat(colour, side=200):
    return Image.new("RGB", (side, side), colour)


def test_grid_is_cut_into_its_images_again(tmp_path):
    before = [flat(colour) for colour in ("red", "green", "blue", "white")]
    after = [flat(colour) for colour in ("cyan", "magenta", "yellow", "black")]
    prompts = ['猫 <b>&"quoted"', "a prompt " * 60]
    path = write_grid(tmp_path / "samples" / "step.png", prompts, [7, 8], {"before": before, "after": after})
    cells = read_grid(path)
    assert [(cell.prompt, cell.seed) for cell in cells] == [
        (prompts[0], 7),
        (prompts[0], 8),
        (prompts[1], 7),
        (prompts[1], 8),
    ]
    for cell, first, second in zip(cells, before, after, strict=True):
        assert not any(differ([first, second], [cell.images["before"], cell.images["after"]]))
    assert [p.name for p in path.parent.iterdir()] == ["step.png"]


def test_small_images_are_enlarged_and_large_ones_reduced(tmp_path):
    for side, shown in ((32, 160), (1024, 512)):
        path = write_grid(
            tmp_path / "g.png", ["p"], [0], {"before": [flat("red", side)], "after": [flat("blue", side)]}
        )
        assert read_grid(path)[0].images["after"].size == (shown, shown)


def test_other_pngs_are_not_grids(tmp_path):
    flat("red").save(tmp_path / "x.png")
    assert read_grid(tmp_path / "x.png") == []


@pytest.mark.parametrize("text", ["x" * 10_000, "a red fox " * 1000, "iiii WWWW é漢 " * 30, "short"])
def test_a_long_prompt_is_cut_to_the_longest_that_fits_without_measuring_it_all(text):
    pen, font, measured = ImageDraw.Draw(Image.new("RGB", (1, 1))), ImageFont.load_default(18), []

    class Pen:
        def textlength(self, text, font):
            measured.append(len(text))
            return pen.textlength(text, font)

    fitted = grid.fitted(Pen(), text, font, 300)
    assert len(measured) < 15 and max(measured) <= 302
    text = " ".join(text.split())
    if fitted != text:
        longest = text[:300]  # as it was found before: one character less at a time
        while pen.textlength(longest + "…", font) > 300:
            longest = longest[:-1]
        assert fitted == longest.rstrip() + "…"
    assert pen.textlength(fitted, font) <= 300
