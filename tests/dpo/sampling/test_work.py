"""dpo.sampling.work: tasks and their seeds, what the protocol says, layouts, base beside aligned."""

import shutil
from dataclasses import replace

import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.drawing.grid import read_grid
from dpo.drawing.images import read_protocol, read_set
from dpo.drawing.prompts import Prompt, PromptSet
from dpo.sampling import work
from dpo.sampling.work import Asked, Layout, draw, image_seed, tasks_of
from dpo.settings.config import Config, change, to_toml

QUICK = {"steps": 2, "guidance": 2.0, "sheets": 0, "device": "cpu"}
TWO = PromptSet("two", (Prompt("a"), Prompt("b", "animals", seed=100)))


def test_every_image_has_its_own_seed_and_order():
    tasks = tasks_of(Asked("m", seeds=2, first_seed=5, strength=(0.6, 0.8), prompts=("x",)), TWO, [])
    assert [task.index for task in tasks] == list(range(8))
    assert [(task.prompt, task.strength, task.number) for task in tasks[:5]] == [
        ("a", 0.6, 5), ("a", 0.6, 6), ("a", 0.8, 5), ("a", 0.8, 6), ("b", 0.6, 5)
    ]  # fmt: skip
    assert tasks[0].seed == tasks[2].seed == image_seed(5, "a", False) != tasks[1].seed
    assert tasks[4].seed == image_seed(105, "b", False) and tasks[4].category == "animals"


def test_same_noise_is_the_number_itself():
    tasks = tasks_of(Asked("m", same_noise=True, first_seed=7, prompts=("x",)), TWO, [])
    assert [task.seed for task in tasks] == [7, 107]


def test_a_seed_fits_what_torch_reads_of_it():
    seeds = [image_seed(number, "a fox", False) for number in range(1000)]
    assert len(set(seeds)) == 1000 and max(seeds) < 2**32 and max(seeds) > 2**31
    wide = torch.randn(4, generator=torch.Generator().manual_seed(5 + 2**32))
    assert torch.equal(wide, torch.randn(4, generator=torch.Generator().manual_seed(5)))  # why no more than 32 bits


def test_each_layout_with_each_prompt_or_with_its_own(tmp_path):
    init = [Layout(tmp_path / "a", "first"), Layout(tmp_path / "b", "second")]
    every = tasks_of(Asked("m", prompts=("x",), strength=(0.5,)), TWO, init)
    assert [(task.prompt, task.layout) for task in every] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    own = tasks_of(Asked("m", strength=(0.5,)), TWO, init)
    assert [(task.prompt, task.layout) for task in own] == [("a", 0), ("b", 1)]


def test_the_embedded_models_own_prompts_and_seeds(tmp_path):
    from dpo.tiny.prompts import prompts

    chosen = work.prompts_of(Asked("embedded"), [])
    rows = prompts("report")
    assert [(one.text, one.seed) for one in chosen.prompts] == list(zip(rows.captions, rows.seeds, strict=True))
    assert work.prompts_of(Asked("m", prompts=("embedded:tuning",)), []).about != chosen.about
    with pytest.raises(UserError, match="--prompts"):
        work.prompts_of(Asked("m"), [])


def test_the_protocol_says_what_decides_the_pixels(world, tmp_path):
    asked = Asked(world("sd15"), prompts=("a", "b"), seeds=3, sampler="ddim", batch=3, width=64, **QUICK)
    found = draw(asked, tmp_path)
    protocol, count = read_protocol(tmp_path)
    assert count == len(found) == 6 and found == read_set(tmp_path)
    assert (protocol.sampler, protocol.steps, protocol.guidance) == ("DDIMScheduler", 2, 2.0)
    assert (protocol.width, protocol.height, protocol.group, protocol.seeds) == (64, 32, 3, (0, 1, 2))
    assert protocol.prompts["count"] == 2 and protocol.device == "cpu" and protocol.precision == "fp32"
    assert (
        protocol.versions["torch"] == torch.__version__.split("+")[0] or protocol.versions["torch"] in torch.__version__
    )
    assert Image.open(found[0].path).size == (64, 32)


def test_sdedit_base_beside_aligned(world, tmp_path):
    Image.new("RGB", (50, 40), "#c1121f").save(tmp_path / "a-red_thing.png")
    asked = Asked(
        world("sd15"), base=world("sd2v"), init_image=str(tmp_path / "a-red_thing.png"), strength=(0.5, 1.0), **QUICK
    )
    out = tmp_path / "out"
    found = draw(Asked(**{**vars(asked), "sheets": 2}), out)
    assert [(one.prompt, one.strength) for one in found] == [("a red thing", 0.5), ("a red thing", 1.0)]
    mine, base = read_protocol(out)[0], read_protocol(out / "base")[0]
    assert "model" in mine.differs(base) and mine.init_images == base.init_images and len(mine.init_images) == 1
    (cell,) = read_grid(out / "sheets/sheet-000.png")
    assert list(cell.images) == ["base 0.5", "base 1", "aligned 0.5", "aligned 1"]


def test_a_layout_is_taken_as_it_is_shown(tmp_path):
    """A photograph's EXIF says how it was held."""
    picture = Image.new("RGB", (40, 20), "red")
    picture.paste("blue", (0, 0, 20, 20))
    exif = Image.Exif()
    exif[0x0112] = 6  # shown a quarter turn to the right: its left half on top
    picture.save(tmp_path / "a.png", exif=exif)
    seen = work._picture(tmp_path / "a.png", (20, 40))
    assert seen.getpixel((10, 5)) == (0, 0, 255) and seen.getpixel((10, 35)) == (255, 0, 0)


def test_too_little_strength_and_no_layout_are_one_line(world, tmp_path):
    with pytest.raises(UserError, match="no such image"):
        draw(Asked(world("sd15"), init_image=str(tmp_path / "no.png"), strength=(0.5,), **QUICK), tmp_path / "out")
    with pytest.raises(UserError, match=r"--strength 0\.3 of 2 steps is no step"):
        draw(Asked(world("sd15"), init_image="examples", strength=(0.3,), **QUICK), tmp_path / "out")
    (tmp_path / "x.png").write_text("no image")
    with pytest.raises(UserError, match="name an image"):
        draw(Asked(world("sd15"), init_image=str(tmp_path / "x.png"), strength=(0.5,), **QUICK), tmp_path / "out")


@pytest.mark.parametrize("change", [{"subset": 1}, {"layout": "dpg", "prompts": ("a",)}])
def test_what_does_not_go_with_a_layout_is_one_line(world, tmp_path, change):
    with pytest.raises(UserError, match="--subset chooses|leave --init-image out"):
        draw(Asked(world("sd15"), init_image="examples", strength=(0.5,), **QUICK, **change), tmp_path / "out")


@pytest.mark.long
def test_bases_drawn_apart_are_merged_too(world, tmp_path):
    asked = Asked(world("sd15"), base=world("sd2v"), prompts=("a", "b", "c"), batch=1, **QUICK)
    parts = [tmp_path / f"p{part}" for part in range(2)]
    for place, part in enumerate(parts):
        draw(asked, part, (place, 2))
    assert len(work.merge(tmp_path / "out", parts, work.Asked("", sheets=1))) == 3
    assert len(read_set(tmp_path / "out/base")) == 3
    assert list(read_grid(tmp_path / "out/sheets/sheet-000.png")[0].images) == ["base", "aligned"]


def test_half_precision_keeps_sdxls_vae_finite(world, tmp_path):
    asked = Asked(world("sdxl"), prompts=("a",), init_image="examples", strength=(0.5, 1.0), precision="bf16", **QUICK)
    found = draw(asked, tmp_path)
    protocol, _ = read_protocol(tmp_path)
    assert (protocol.precision, protocol.vae_precision) == ("bf16", "fp32") and len(found) == 6
    assert {one.fault for one in found} == {""}


def test_faults_are_counted_and_named(world, tmp_path, monkeypatch, caplog):
    from diffusers import AutoencoderKL

    decode = AutoencoderKL.decode
    monkeypatch.setattr(AutoencoderKL, "decode", lambda self, x, **k: (decode(self, x, **k)[0] * float("nan"),))
    found = draw(Asked(world("sd15"), prompts=("a", "b"), **QUICK), tmp_path)
    assert [one.fault for one in found] == ["not finite"] * 2
    assert f"2 of 2 images are not finite: {found[0].path.name}, {found[1].path.name}" in caplog.text


def test_under_torchrun_each_process_has_its_gpu(monkeypatch):
    asked = []
    monkeypatch.setattr(work, "pick_device", asked.append)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    work.device_of("auto")
    work.device_of("cpu")
    assert asked == ["cuda:3", "cpu"]


def test_a_base_is_asked_with_captions_as_long_as_the_run(world, tmp_path):
    """The same weights twice, of which one is a run's: the images are the same too."""
    folder = shutil.copytree(world("sd35"), tmp_path / "run")
    (folder / "config.toml").write_text(to_toml(change(Config(), model="m", text_tokens=16)))
    asked = Asked(str(folder), base=world("sd35"), prompts=("a",), width=32, height=32, **QUICK)
    drawn = draw(asked, tmp_path / "out")
    beside = read_set(tmp_path / "out" / "base")
    assert read_protocol(tmp_path / "out" / "base")[0].text_tokens == 16
    assert [one.path.read_bytes() for one in beside] == [one.path.read_bytes() for one in drawn]
    draw(replace(asked, text_tokens=64), tmp_path / "longer")
    assert read_protocol(tmp_path / "longer")[0].text_tokens == 64
    with pytest.raises(UserError, match="--text-tokens is for flow-matching models"):
        draw(Asked(world("sd15"), prompts=("a",), text_tokens=16, **QUICK), tmp_path / "none")


@pytest.mark.parametrize("side", ["width", "height"])
def test_a_side_that_a_flow_would_round_is_refused(world, tmp_path, side):
    with pytest.raises(UserError, match=f"--{side} 68: .*flux-dev draws sides that are multiples of 8: 64 or 72"):
        draw(Asked(world("flux-dev"), prompts=("a",), **{side: 68}, **QUICK), tmp_path)


def test_a_base_is_drawn_in_the_steps_and_with_the_guidance_of_the_model_beside_it(world, tmp_path):
    """Whose files do not say that it was distilled, which the run does."""
    folder = shutil.copytree(world("sd35"), tmp_path / "run")
    (folder / "config.toml").write_text(to_toml(change(Config(), model="m", timesteps="turbo", text_tokens=16)))
    draw(Asked(str(folder), base=world("sd35"), prompts=("a",), sheets=0, device="cpu", width=32), tmp_path / "out")
    mine, base = (read_protocol(tmp_path / "out" / place)[0] for place in (".", "base"))
    assert (base.steps, base.guidance, base.width, base.height) == (4, 0.0, 32, mine.height)
    assert mine.differs(base) == []


def test_a_side_beyond_a_models_positions_is_refused(world, tmp_path):
    with pytest.raises(UserError, match="--height 256: .* draws sides of 192 pixels at most"):
        draw(Asked(world("sd35"), prompts=("a",), width=64, height=256, **QUICK), tmp_path)
