"""dpo.models.save: what is written loads in diffusers with every weight, and appears whole or not at all."""

import copy
import errno
import itertools
import os
import shutil
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch
import transformers

from dpo.models import lora, save
from dpo.models.family import Model
from dpo.models.load import load
from dpo.models.pipeline import pipeline_of
from dpo.models.save import detached, save_lora, save_pipeline
from tests.help.allocations import Allocations
from tests.help.flow import TRAINED, make_flow
from tests.help.worlds import KINDS, make_pipeline


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    made = {kind: make_pipeline(root / kind, kind) for kind in KINDS} | {
        kind: make_flow(root / kind, kind) for kind in TRAINED
    }
    return {kind: load(str(folder)) for kind, folder in made.items()}


def trained(model: Model) -> torch.nn.Module:
    unet = copy.deepcopy(model.denoiser)
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(0.01)
    return unet


def same(one: torch.nn.Module, two: torch.nn.Module) -> bool:
    a, b = one.state_dict(), two.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.long
@pytest.mark.parametrize("kind", [*KINDS, *TRAINED])
def test_pipeline_loads_with_every_weight_and_draws(models, tmp_path, kind):
    model = models[kind]
    unet = trained(model)
    save_pipeline(model, unet, tmp_path / "out")
    pipe = diffusers.DiffusionPipeline.from_pretrained(tmp_path / "out", use_safetensors=True)
    assert type(pipe).__name__ == model.family.pipeline
    drawing = getattr(pipe, model.family.denoiser)
    assert same(drawing, unet) and not same(drawing, model.denoiser)
    assert same(pipe.vae, model.vae)
    for (name, _), encoder in zip(model.family.text_encoders, model.text_encoders, strict=True):
        assert same(getattr(pipe, name), encoder)
    for (name, _), tokenizer in zip(model.family.tokenizers, model.tokenizers, strict=True):
        assert getattr(pipe, name)("a fox in rain").input_ids == tokenizer("a fox in rain").input_ids
    assert type(pipe.scheduler).__name__ == model.scheduler_config["_class_name"]
    of_betas = ("beta_start", "beta_end", "beta_schedule", "timestep_spacing", "prediction_type", "steps_offset")
    of_flow = ("shift", "use_dynamic_shifting", "base_shift", "max_shift", "shift_terminal")
    for key in (*of_betas, *of_flow):
        assert pipe.scheduler.config.get(key) == getattr(pipeline_of(model).scheduler.config, key, None)
        if key in model.scheduler_config:
            assert pipe.scheduler.config[key] == model.scheduler_config[key]
    assert {path.suffix for path in (tmp_path / "out").rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".txt",
        ".jinja",  # of a chat
    }
    pipe.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": 2, "guidance_scale": 0.0}
    image = pipe(prompt="a fox", **steps, height=32, width=32, output_type="np").images
    assert image.shape == (1, 32, 32, 3)


def test_what_is_written_loads_here_again(models, tmp_path):
    unet = trained(models["sdxl-turbo"])
    save_pipeline(models["sdxl-turbo"], unet, tmp_path / "out")
    again = load(str(tmp_path / "out"))
    assert same(again.denoiser, unet) and again.turbo and again.family.name == "sdxl"


def test_saving_leaves_the_model_as_it_was(models, tmp_path):
    unet = trained(models["sd15"]).double().requires_grad_(True)
    save_pipeline(models["sd15"], detached(unet), tmp_path)
    assert unet.dtype == torch.float64 and all(p.requires_grad for p in unet.parameters())
    assert models["sd15"].denoiser.dtype == torch.float32


# --- whole or not at all ------------------------------------------------------------------------------------------------


def left(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_failure_while_writing_leaves_nothing(models, tmp_path, monkeypatch):
    def half_way(self, folder, **options):
        (Path(folder) / "unet").mkdir()
        (Path(folder) / "model_index.json").write_text("{}")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(diffusers.StableDiffusionPipeline, "save_pretrained", half_way)
    with pytest.raises(OSError, match="No space left"):
        save_pipeline(models["sd15"], models["sd15"].denoiser, tmp_path / "out")
    assert left(tmp_path / "out") == []


def test_failure_while_writing_leaves_the_earlier_result(models, tmp_path, monkeypatch):
    out = tmp_path / "out"
    save_pipeline(models["sd15"], models["sd15"].denoiser, out)
    (out / "metrics.jsonl").write_text("{}\n")
    before = left(out)
    with monkeypatch.context() as patch:
        patch.setattr(
            diffusers.UNet2DConditionModel, "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(OSError("no"))
        )
        with pytest.raises(OSError, match="no"):
            save_pipeline(models["sd15"], trained(models["sd15"]), out)
    assert left(out) == before
    assert same(load(str(out)).denoiser, models["sd15"].denoiser)
    unet = trained(models["sd15"])
    save_pipeline(models["sd15"], unet, out)
    assert left(out) == before and same(load(str(out)).denoiser, unet)


def killed_at(number: int, call) -> bool:
    """Whether `call`, made in a process of its own, was killed just before its change number `number` to the folder."""
    pid = os.fork()
    if not pid:
        left = [number]

        def counted(change):
            def made(*args, **named):
                left[0] -= 1
                if left[0] < 0:
                    os._exit(9)
                return change(*args, **named)

            return made

        for name in ("replace", "rename", "unlink", "rmdir", "remove"):
            setattr(os, name, counted(getattr(os, name)))
        try:
            call()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9


def loaded(folder: Path) -> dict[str, torch.nn.Module] | None:
    """What diffusers loads from the folder; None where it refuses it."""
    try:
        pipe = diffusers.DiffusionPipeline.from_pretrained(folder, use_safetensors=True)
    except OSError:
        return None
    return {"unet": pipe.unet, "vae": pipe.vae, "text_encoder": pipe.text_encoder}


def is_result(found: dict[str, torch.nn.Module], model: Model, unet: torch.nn.Module) -> bool:
    frozen = same(found["vae"], model.vae) and same(found["text_encoder"], model.text_encoders[0])
    return frozen and same(found["unet"], unet)


@pytest.mark.long
@pytest.mark.parametrize(
    "before",
    [
        *(pytest.param(b, marks=pytest.mark.slow) for b in ("the same model", "in several files")),
        "another model",
        "nothing",
    ],
)
def test_a_kill_at_any_moment_leaves_a_whole_result(models, tmp_path, before):
    """The earlier one or the new one; of another model's, or of none, also nothing that loads, but never a mixture."""
    model, new = models["sd15"], detached(trained(models["sd15"]))
    other = replace(model, vae=trained(replace(model, denoiser=model.vae)))
    early = {"another model": other}.get(before, model)
    save_pipeline(model, new, tmp_path / "new")
    if before != "nothing":
        size = "200KB" if before == "in several files" else "10GB"
        save_pipeline(early, early.denoiser, tmp_path / "old")
        shutil.rmtree(tmp_path / "old" / "unet")
        early.denoiser.save_pretrained(tmp_path / "old" / "unet", max_shard_size=size)
        assert loaded(tmp_path / "old") is not None
    config = tmp_path / "old" / "vae" / "config.json"
    if config.is_file():  # a library of another version wrote it: it says the same
        config.write_text(config.read_text().replace('_diffusers_version": "', '_diffusers_version": "0.'))
    seen = []
    for number in itertools.count():
        part, out = tmp_path / f"part-{number}", tmp_path / f"out-{number}"
        shutil.copytree(tmp_path / "new", part)
        shutil.copytree(tmp_path / "old", out) if before != "nothing" else out.mkdir()
        killed = killed_at(number, lambda part=part, out=out: save._publish(part, out))
        found = loaded(out)
        whole = [found is not None and is_result(found, *one) for one in ((early, early.denoiser), (model, new))]
        assert sum(whole) == (found is not None), f"a mixture after {number} changes"
        seen.append("nothing" if found is None else "old" if whole[0] else "new")
        if not killed:
            break
        if not number % 8:  # the next start
            save_pipeline(model, new, out)
            assert is_result(loaded(out), model, new)
    assert number > 5 and seen[-1] == "new"
    between = [] if before in ("the same model", "in several files") else ["nothing"]
    first = ["old"] if before != "nothing" else []
    assert list(dict.fromkeys(seen)) == [*first, *between, "new"], seen
    assert not list((out / "unet").glob("*-of-*"))


def test_a_linked_part_is_written_where_the_link_points(models, tmp_path):
    """To another disk, perhaps: nothing is staged outside of it, and what is not a run's stays."""
    out, far = tmp_path / "out", tmp_path / "far"
    for folder in (out, far):
        folder.mkdir()
    (far / "notes.txt").write_text("mine")
    (far / ".result.part-1").mkdir()  # of a run that was killed
    (out / "unet").symlink_to(far)
    for unet in (models["sd15"].denoiser, trained(models["sd15"])):
        names = save_pipeline(models["sd15"], unet, out)
        assert (out / "unet").is_symlink() and same(loaded(out)["unet"], unet)
    assert left(far) == ["config.json", "diffusion_pytorch_model.safetensors", "notes.txt"]
    assert sorted(names) == sorted(
        path.relative_to(out).as_posix() for path in [*out.rglob("*"), *(out / "unet").iterdir()]
        if path.is_file() and path.name != "notes.txt"
    )  # fmt: skip


def test_what_is_not_a_runs_stays_beside_a_result(models, tmp_path):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "notes.txt").write_text("mine")
    (tmp_path / "vae").write_text("a file where a folder comes")
    (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").write_text("mine")
    assert "unet/notes.txt" not in save_pipeline(models["sd15"], models["sd15"].denoiser, tmp_path)
    assert (tmp_path / "unet" / "notes.txt").read_text() == "mine" and loaded(tmp_path)
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").read_text() == "mine"


def test_lora_is_published_the_same_way(models, tmp_path, monkeypatch):
    unet = copy.deepcopy(models["sd15"].denoiser)
    lora.add(unet, rank=2, alpha=2, target_modules=("to_q",), dropout=0.0, seed=0)
    monkeypatch.setattr(lora, "save", lambda *a: (_ for _ in ()).throw(OSError("no")))
    with pytest.raises(OSError, match="no"):
        save_lora(models["sd15"], unet, tmp_path / "out", layout="diffusers")
    assert left(tmp_path / "out") == []


# --- copies ---------------------------------------------------------------------------------------------------------------


def test_detached_copy(models):
    half = copy.deepcopy(models["sd15"].denoiser).bfloat16()
    twin = detached(half)
    assert twin.dtype == torch.float32 and half.dtype == torch.bfloat16
    assert torch.equal(twin.conv_in.weight, half.conv_in.weight.float())
    with torch.no_grad():
        twin.conv_in.weight.zero_()
    assert half.conv_in.weight.any()
    assert detached(copy.deepcopy(half).double()).dtype == torch.float64


def test_a_copy_allocates_each_tensor_once_on_the_host(models, monkeypatch):
    """Nothing is copied where it lies, in the dtype it has: that copy would be made on the device."""
    unet = copy.deepcopy(models["sdxl"].denoiser).bfloat16()
    monkeypatch.setattr(torch.nn.Parameter, "__deepcopy__", None)
    monkeypatch.setattr(torch.Tensor, "__deepcopy__", None)
    with Allocations() as made:
        twin = detached(unet)
    assert made.elements == sum(p.numel() for p in unet.parameters()) and twin.dtype == torch.float32
    with Allocations() as made:
        again = detached(twin)
    assert not made.elements and same(again, twin), "what is on the host in that dtype already is shared"


def test_averaged_weights_take_their_place(models):
    unet = models["sd15"].denoiser
    average = {"conv_in.weight": torch.full_like(unet.conv_in.weight, 0.5)}
    twin = detached(unet, average)
    assert (twin.conv_in.weight == 0.5).all() and torch.equal(twin.conv_in.bias, unet.conv_in.bias)
    assert not (unet.conv_in.weight == 0.5).all()


def test_tokenizers_are_saved_for_older_transformers_too(models, tmp_path):
    """vocab.json and merges.txt alone, without tokenizer.json, give the same tokens."""
    save_pipeline(models["sdxl"], models["sdxl"].denoiser, tmp_path / "out")
    for name, tokenizer in zip(("tokenizer", "tokenizer_2"), models["sdxl"].tokenizers, strict=True):
        (tmp_path / "out" / name / "tokenizer.json").unlink()
        again = transformers.CLIPTokenizer.from_pretrained(tmp_path / "out" / name)
        text = "a photograph of a red fox, 狐"
        assert again(text).input_ids == tokenizer(text).input_ids and again.get_vocab() == tokenizer.get_vocab()
        assert (tmp_path / "out" / name / "merges.txt").read_text().startswith("#version: 0.2")
