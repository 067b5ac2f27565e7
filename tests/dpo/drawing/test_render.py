"""dpo.drawing.render: plain diffusers redraws an image by its seed; broken images are told; tiles and clocks."""

import numpy as np
import pytest
import torch
from PIL import Image

from dpo.drawing.render import Stopwatch, Task, ready, render
from dpo.models.load import load
from dpo.models.pipeline import pipeline_of
from dpo.sampling import samplers
from tests.help.drawing import protocol
from tests.help.flow import TRAINED

CPU = torch.device("cpu")
TASKS = [Task(n, f"a {colour} thing", 40 + n) for n, colour in enumerate(("red", "blue", "green"))]
LEVELS = 1  # of 255: images drawn together differ from one alone by rounding


def drawn(pipe, tasks=TASKS, layouts=(), **changes):
    asked = protocol(**changes)
    with ready(pipe, CPU, asked):
        return render(pipe, tasks, asked, layouts)


def apart(image, other):
    return int(np.abs(np.asarray(image).astype(int) - np.asarray(other).astype(int)).max())


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sd2v", "sdxl", "sdxl-turbo"])
@pytest.mark.parametrize("sampler", ["model", "euler-a", "ddpm"])
def test_plain_diffusers_redraws_an_image_by_its_seed(world, kind, sampler):
    from diffusers import DiffusionPipeline

    pipe = pipeline_of(load(world(kind)))
    samplers.use(pipe, sampler)
    images = drawn(pipe)
    plain = DiffusionPipeline.from_pretrained(world(kind))
    plain.set_progress_bar_config(disable=True)
    plain.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    task = TASKS[1]
    again = plain(
        task.prompt,
        num_inference_steps=2,
        guidance_scale=2.0,
        height=32,
        width=32,
        generator=torch.Generator("cpu").manual_seed(task.seed),
    ).images[0]
    assert apart(images[1].image, again) <= LEVELS
    assert apart(images[0].image, again) > 10  # the tolerance tells two images apart


@pytest.mark.long
@pytest.mark.parametrize("kind", TRAINED)
def test_plain_diffusers_redraws_an_image_of_a_flow(world, kind):
    """With captions as long as in training; Qwen-Image is guided by an argument and a caption of its own."""
    from diffusers import DiffusionPipeline

    images = drawn(pipeline_of(load(world(kind), text_tokens=16)), width=64, height=64)
    guided = {"true_cfg_scale": 2.0, "negative_prompt": " "} if kind == "qwen-image" else {"guidance_scale": 2.0}
    plain = DiffusionPipeline.from_pretrained(world(kind))
    plain.set_progress_bar_config(disable=True)
    again, unguided = (
        plain(
            prompt=TASKS[1].prompt,
            num_inference_steps=2,
            height=64,
            width=64,
            max_sequence_length=16,
            generator=torch.Generator("cpu").manual_seed(TASKS[1].seed),
            **told,
        ).images[0]
        for told in (guided, dict.fromkeys(guided, 1.0) | ({"negative_prompt": None} if len(guided) == 2 else {}))
    )
    assert apart(images[1].image, again) <= LEVELS
    assert apart(images[0].image, again) > 10 and apart(unguided, again) > LEVELS


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_plain_diffusers_redraws_sdedit_too(world, kind):
    import diffusers

    pipe = pipeline_of(load(world(kind)))
    layout = Image.new("RGB", (32, 32), "#c1121f")
    tasks = [Task(n, "a thing", 7, strength=strength) for n, strength in enumerate((0.5, 1.0))]
    images = drawn(pipe, tasks, [layout], steps=4)
    name = "StableDiffusionXLImg2ImgPipeline" if kind == "sdxl" else "StableDiffusionImg2ImgPipeline"
    plain = getattr(diffusers, name).from_pretrained(world(kind))
    plain.set_progress_bar_config(disable=True)
    for task, found in zip(tasks, images, strict=True):
        again = plain(
            task.prompt,
            image=layout,
            strength=task.strength,
            num_inference_steps=4,
            guidance_scale=2.0,
            generator=torch.Generator("cpu").manual_seed(7),
        ).images[0]
        assert apart(found.image, again) <= LEVELS
    assert apart(images[0].image, images[1].image) > 10


def test_nothing_is_censored_or_marked(world):
    pipe = pipeline_of(load(world("sdxl")))
    assert pipe.watermark is None
    pipe = pipeline_of(load(world("sd15")))
    assert pipe.safety_checker is None


@pytest.mark.parametrize(
    ("value", "fault"), [(float("nan"), "not finite"), (float("inf"), "not finite"), (0.2, "flat")]
)
@pytest.mark.parametrize("kind", ["sd15", "sd35", "qwen-image"])
def test_a_broken_image_is_told(world, monkeypatch, kind, value, fault):
    pipe = pipeline_of(load(world(kind)))
    decode = pipe.vae.decode

    def broken(latents, **options):
        (image,) = decode(latents, **options)
        return (torch.full_like(image, value),)

    size = {} if kind == "sd15" else {"width": 64, "height": 64}
    assert [one.fault for one in drawn(pipe, TASKS[:1], **size)] == [""]
    monkeypatch.setattr(pipe.vae, "decode", broken)
    assert [one.fault for one in drawn(pipe, TASKS[:2], **size)] == [fault] * 2


def test_the_vae_decodes_one_image_at_a_time_and_in_tiles(world, monkeypatch):
    pipe = pipeline_of(load(world("sd15")))
    sizes = []
    decoder = pipe.vae.decoder.forward
    monkeypatch.setattr(
        pipe.vae.decoder, "forward", lambda x, *a, **k: sizes.append(tuple(x.shape)) or decoder(x, *a, **k)
    )
    drawn(pipe)
    assert sizes == [(1, 4, 8, 8)] * 3
    sizes.clear()
    drawn(pipe, TASKS[:1], vae_tile=16)
    assert set(sizes) == {(1, 4, 4, 4), (1, 4, 2, 4), (1, 4, 4, 2), (1, 4, 2, 2)} and not pipe.vae.use_tiling


def test_no_gradient_no_global_generator_and_the_modules_stay_trainable(world):
    pipe = pipeline_of(load(world("sd15")))
    state = torch.get_rng_state()
    drawn(pipe, TASKS[:1])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(p.is_inference() for p in pipe.unet.parameters())


def test_the_stopwatch_counts_forward_passes_alone():
    module = torch.nn.Identity()
    watch = Stopwatch(module, CPU)
    assert watch.seconds() == 0
    module(torch.zeros(1))
    once = watch.seconds()
    assert once > 0
    watch.stop()
    module(torch.zeros(1))
    assert watch.seconds() == once
