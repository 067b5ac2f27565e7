"""dpo.training.start: a run that starts from a LoRA, with adapters or without, what it is compared with and what it saves.

The oracle is diffusers: the LoRA, and the saved result, loaded by it on the model's own weights.
"""

import math
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.models import lora
from dpo.models.load import load
from dpo.models.save import save_lora
from dpo.pages.folder import ADAPTER_FILE
from dpo.settings.config import Model
from dpo.training import results
from dpo.training import start as starting
from dpo.training.state import snapshot
from tests.dpo.models.test_denoiser import run as predict
from tests.dpo.models.test_lora import train
from tests.help.running import advance, everything, make_run
from tests.help.worlds import make_pipeline

FILE = "pytorch_lora_weights.safetensors"
SHORT = ["--batch-size", "2", "--learning-rate", "1e-2", "--optimizer", "adamw", "--precision", "fp32"]


@pytest.fixture(scope="module")
def sft(world, tmp_path_factory):
    """Folder of a supervised LoRA of rank 3 and alpha 6 by kind, in kohya's layout; made once."""
    made: dict[str, Path] = {}

    def place(kind: str, targets: tuple[str, ...] = ("to_q", "to_v"), layout: str = "kohya") -> Path:
        name = f"{kind}-{len(targets)}-{layout}"
        if name not in made:
            model = load(world(kind))
            lora.add(model.denoiser, rank=3, alpha=6.0, target_modules=targets, dropout=0.0, seed=1)
            train(model.denoiser)
            made[name] = tmp_path_factory.mktemp(name)
            save_lora(model, model.denoiser, made[name], layout=layout)
        return made[name]

    return place


@torch.no_grad()
def by_diffusers(folder: str, adapter: Path | None = None) -> torch.Tensor:
    """The prediction of a pipeline's UNet as diffusers loads it, with an adapter where one is named."""
    pipe = diffusers.DiffusionPipeline.from_pretrained(folder)
    if adapter is not None:
        pipe.load_lora_weights(adapter, weight_name=ADAPTER_FILE)
    return predict(pipe.unet.eval(), None)


@torch.no_grad()
def of(run) -> torch.Tensor:
    return predict(run.model.denoiser.eval(), None)


def of_reference(run) -> torch.Tensor:
    """The policy without its adapters, which the reference is where it has no copy."""
    with lora.adapters_off(lora.adapter_layers(run.model.denoiser)):
        return of(run)


def close(one: torch.Tensor, two: torch.Tensor) -> bool:
    return torch.allclose(one, two, rtol=1e-4, atol=1e-5)


def first_terms(run):
    batches = run.batches()
    terms = run.step(run.encoder.inputs(next(batches)), run.correction())
    batches.close()
    return terms


@pytest.mark.long
@pytest.mark.parametrize(("kind", "layout"), [("sd15", "diffusers"), ("sdxl", "kohya")])
def test_preferences_after_a_supervised_lora(world, sft, tmp_path, kind, layout):
    """It is merged, the reference has it, and the result, on the model's own weights, gives what was trained."""
    start, model = sft(kind), world(kind)
    flags = ["--lora", "--rank", "2", "--alpha", "1", "--lora-init", str(start), "--lora-format", layout, *SHORT]
    run = make_run(model, world("pairs"), tmp_path, *flags)
    begun = by_diffusers(model, start)
    assert close(of(run), begun) and close(of_reference(run), begun) and not close(begun, by_diffusers(model))
    terms = first_terms(run)
    assert not terms.logit.any() and torch.equal(terms.loss, torch.full_like(terms.loss, math.log(2)))
    advance(run, 2)
    results.write(run)
    trained = of(run)
    assert (trained - begun).abs().max() > 1e-3
    assert close(by_diffusers(model, tmp_path), trained)
    stored = load_file(tmp_path / FILE)
    ranks = {len(value) for name, value in stored.items() if "lora_A" in name or "lora_down" in name}
    assert ranks == {5}  # 3 + 2, for every layer


@pytest.mark.long
def test_the_adapter_itself_goes_on_where_the_model_is_compared_with(world, sft, tmp_path):
    start, model = sft("sd15"), world("sd15")
    flags = ["--lora", "--rank", "2", "--lora-init", str(start), "--reference-model", "base", *SHORT]
    run = make_run(model, world("pairs"), tmp_path, *flags)
    begun, own = by_diffusers(model, start), by_diffusers(model)
    assert close(of(run), begun) and close(of_reference(run), own) and first_terms(run).logit.any()
    assert (run.config.lora.rank, run.config.lora.alpha) == (3, 6.0)
    assert run.config.lora.target_modules == ("to_q", "to_v") and run.config.runtime.reference == "adapter"
    advance(run, 2)
    results.write(run)
    assert close(by_diffusers(model, tmp_path), of(run)) and not close(of(run), begun)


@pytest.mark.long
@pytest.mark.parametrize("reference", ["init", "base"])
def test_all_weights_after_a_supervised_lora(world, sft, tmp_path, reference):
    start, model = sft("sd15"), world("sd15")
    flags = ["--lora-init", str(start), "--reference-model", reference, *SHORT[2:], "--batch-size", "2"]
    run = make_run(model, world("pairs"), tmp_path, *flags, "--learning-rate", "1e-4")
    begun = by_diffusers(model, start)
    assert close(of(run), begun) and first_terms(run).logit.any() == (reference == "base")
    own = make_run(model, world("pairs"), tmp_path / "other", *SHORT)
    assert (run.fingerprints["reference"] == own.fingerprints["reference"]) == (reference == "base")
    advance(run, 2)
    results.write(run)
    assert close(by_diffusers(str(tmp_path)), of(run)) and not close(of(run), begun)


@pytest.mark.long
def test_a_supervised_run_goes_on_with_its_adapter(world, sft, tmp_path):
    start, model = sft("sd15", ("to_q", "to_k", "to_v", "to_out.0"), "diffusers"), world("sd15")
    run = make_run(model, world("pairs"), tmp_path, "--lora", "--method", "sft", "--lora-init", str(start), *SHORT)
    assert close(of(run), by_diffusers(model, start)) and run.step.reference is None
    assert (run.config.lora.rank, run.config.lora.alpha) == (3, 3.0)  # in diffusers' layout the factors have the scale
    assert run.config.lora.target_modules == ("to_q", "to_k", "to_v", "to_out.0")
    results.write(run)
    first, second = load_file(start / FILE), load_file(tmp_path / FILE)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_an_uneven_adapter_goes_on_at_its_largest_rank(world, sft, tmp_path):
    stored = load_file(sft("sd15") / FILE)
    stem = next(name for name in stored if name.endswith("attn1_to_q.alpha")).removesuffix(".alpha")
    stored[f"{stem}.lora_down.weight"] = stored[f"{stem}.lora_down.weight"][:1].clone()
    stored[f"{stem}.lora_up.weight"] = stored[f"{stem}.lora_up.weight"][:, :1].clone()
    save_file(stored, tmp_path / "uneven.safetensors")
    flags = ["--lora", "--lora-init", str(tmp_path / "uneven.safetensors"), "--method", "sft", *SHORT]
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags)
    pipe = diffusers.DiffusionPipeline.from_pretrained(world("sd15"))
    pipe.load_lora_weights(tmp_path, weight_name="uneven.safetensors")
    assert run.config.lora.rank == 3
    with torch.no_grad():
        assert close(of(run), predict(pipe.unet.eval(), None))


@pytest.mark.long
def test_on_another_unet(world, sft, tmp_path):
    """--unet-init first, and the LoRA on it."""
    other = make_pipeline(tmp_path / "other", "sd15", seed=1)
    flags = ["--unet-init", str(other), "--lora-init", str(sft("sd15")), *SHORT]
    run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags)
    assert close(of(run), by_diffusers(str(other), sft("sd15")))
    base = make_run(world("sd15"), world("pairs"), tmp_path / "base", *flags, "--lora", "--reference-model", "base")
    assert close(of(base), by_diffusers(str(other), sft("sd15"))) and close(
        of_reference(base), by_diffusers(str(other))
    )
    assert base.fingerprints["reference"] == base.fingerprints["model"] != base.fingerprints["start"]


@pytest.mark.long
@pytest.mark.parametrize("reference", ["init", "base"])
def test_resume_is_exact(world, sft, tmp_path, reference):
    start = tmp_path / "start.safetensors"
    save_file(load_file(sft("sd15") / FILE), start)
    flags = ["--lora", "--lora-init", str(start), "--reference-model", reference, "--steps", "4", *SHORT]
    straight = make_run(world("sd15"), world("pairs"), tmp_path / "straight", *flags)
    advance(straight, 4)
    first = make_run(world("sd15"), world("pairs"), tmp_path / "broken", *flags)
    advance(first, 2)
    snapshot(first)
    second = make_run(world("sd15"), world("pairs"), tmp_path / "broken", *flags, "--resume", "latest")
    advance(second, 2)
    expected, found = everything(straight), everything(second)
    assert expected.keys() == found.keys() and all(torch.equal(expected[name], found[name]) for name in expected)
    for one in (straight, second):
        results.write(one)
    one, two = (load_file(tmp_path / name / FILE) for name in ("straight", "broken"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    if reference == "init":
        save_file({name: value + 1 if "lora_up" in name else value for name, value in load_file(start).items()}, start)
        with pytest.raises(UserError, match="from other starting weights than --unet-init and --lora-init give now"):
            make_run(world("sd15"), world("pairs"), tmp_path / "broken", *flags, "--resume", "latest")


def test_what_is_done_is_said(world, sft, tmp_path, caplog):
    flags = ["--lora", "--lora-init", str(sft("sd15")), *SHORT]
    with caplog.at_level("INFO", "dpo"):
        make_run(world("sd15"), world("pairs"), tmp_path / "one", *flags)
        assert "16 layers of rank 3, merged into the UNet; the saved adapter will contain it" in caplog.text
        caplog.clear()
        make_run(world("sd15"), world("pairs"), tmp_path / "two", *flags, "--reference-model", "base", "--rank", "8")
        assert "go on as the adapter: rank 3, alpha 6, layers to_q, to_v" in caplog.text
        assert "--rank has no effect because the adapter of --lora-init goes on" in caplog.text


def test_what_cannot_be_started_from_is_one_line(world, sft, tmp_path):
    (unet,) = (Path(world("sd15")) / "unet").glob("*.safetensors")
    for place, message in (
        (tmp_path / "nowhere", "no such folder or file"),
        (unet, "is no LoRA of the UNet"),
        (sft("sdxl"), "made for another architecture|is no LoRA"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            make_run(world("sd15"), world("pairs"), tmp_path / "run", "--lora", "--lora-init", str(place), *SHORT)
        assert "\n" not in str(caught.value) and "--lora-init" in str(caught.value)


@pytest.mark.parametrize("name", ["model", "unet_init", "lora_init"])
def test_a_result_that_its_run_has_left_is_warned_of(world, sft, monkeypatch, caplog, name):
    """Once for each place that names it."""
    names = {"model": world("sd15"), "unet_init": f"{world('sd15')}/unet", "lora_init": str(sft("sd15"))}
    monkeypatch.setattr(starting, "left_by_run", lambda at: f"{at} was left" if at == names[name] else None)
    starting.check_named(Model(**names))
    assert [record.getMessage() for record in caplog.records if record.name == "dpo"] == [
        f"--{name.replace('_', '-')} {names[name]}: {names[name]} was left"
    ]


def test_a_run_that_has_no_unet_is_no_start(world, tmp_path):
    """Told before pairs are read: one that is not finished, and one that trained a LoRA."""
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('[method]\nmethod = "dpo"\n[output]\ncheckpoint_every = 1\n', "utf-8")
    for name in (run, run / "unet"):
        with pytest.raises(UserError, match="that run has no result yet: finish it with --resume latest"):
            starting.check_named(Model(model=world("sd15"), unet_init=str(name)))
    (run / ADAPTER_FILE).touch()
    with pytest.raises(UserError, match="that run trained a LoRA, so name it with --lora-init"):
        starting.check_named(Model(model=world("sd15"), unet_init=str(run)))


def test_a_run_that_has_no_lora_is_no_lora(world, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.toml").write_text('[method]\nmethod = "dpo"\n[output]\ncheckpoint_every = 1\n', "utf-8")
    with pytest.raises(UserError, match="--lora-init .* has no result yet: finish it with --resume latest"):
        starting.check_named(Model(model=world("sd15"), lora_init=str(run)))
    (run / "unet").mkdir()
    with pytest.raises(UserError, match="that run trained all weights, so name it with --unet-init"):
        starting.check_named(Model(model=world("sd15"), lora_init=str(run)))
