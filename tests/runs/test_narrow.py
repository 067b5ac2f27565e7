"""Frozen weights that files hold in half precision are not held in fp32 on the way, and the run is the same to the bit."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.models import load as loading
from dpo.models import ready
from dpo.models.family import families
from dpo.settings.flags import parse
from dpo.training import build, preparing
from tests.help.flow import SMALL
from tests.help.running import advance, make_run, weights

LORA = ("--lora", "--rank", "2", "--batch-size", "2", "--precision", "bf16", "--learning-rate", "1e-3")
KINDS = ("sd15", "sdxl", "sd35", "flux-dev", "flux2-klein-base", "qwen-image")


def rewritten(folder: str, place: Path, dtype: torch.dtype, parts: tuple[str, ...] = ()) -> str:
    """A copy of a pipeline whose denoiser and text encoders are stored in `dtype`."""
    copy = Path(shutil.copytree(folder, place))
    for file in copy.glob("*/*.safetensors"):
        if not file.parent.name.startswith(parts or ("unet", "transformer", "text_encoder")):
            continue
        state = {
            name: value.to(dtype) if value.is_floating_point() else value for name, value in load_file(file).items()
        }
        save_file(state, file, metadata={"format": "pt"})
    return str(copy)


@pytest.fixture
def loaded(monkeypatch):
    """The parts that are loaded, by class, with the dtypes of their weights as they then are."""
    found = {}
    component = loading.component

    def watched(cls, *arguments, **options):
        module = component(cls, *arguments, **options)
        found[cls.__name__] = {p.dtype for p in module.parameters()}
        return module

    monkeypatch.setattr(loading, "component", watched)
    return found


def everything(run) -> dict[str, torch.Tensor]:
    """Weights and buffers of all parts, adapters too, and of reference and policy alike."""
    parts = {"denoiser": run.model.denoiser, "vae": run.model.vae}
    parts |= {f"text {number}": encoder for number, encoder in enumerate(run.model.text_encoders)}
    return {
        f"{name}: {key}": value.detach().clone()
        for name, part in parts.items()
        for key, value in (*part.named_parameters(), *part.named_buffers())
    }


@pytest.mark.long
@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=[pytest.mark.slow] * (one not in ("sd15", "flux-dev"))) for one in KINDS]
)
def test_a_lora_run_of_files_in_half_precision(world, tmp_path, monkeypatch, loaded, kind, stored):
    """To fp32 and then to bf16 is what is compared with: weights, buffers, hashes, and two updates."""
    model = rewritten(world(kind), tmp_path / "model", stored)
    flags = (*LORA, *(SMALL if kind not in ("sd15", "sdxl") else ()))
    runs = {}
    for name, parts in (("through fp32", ()), ("as stored", ("text", "denoiser"))):
        monkeypatch.setattr(build, "held_narrow", lambda *asked, parts=parts: parts)
        runs[name] = make_run(model, world("pairs"), tmp_path / name, *flags)
        family = families()[runs[name].model.family.name]
        own = {family.denoiser_class, *(cls for _, cls in family.text_encoders)}
        assert own <= loaded.keys()
        wanted = {torch.float32} if not parts else {stored}
        # T5 keeps some layers in fp32 where the others are in fp16, by a rule of its library
        assert all(loaded[cls] - ({torch.float32} if parts and "T5" in cls else set()) <= wanted for cls in own), loaded
        assert loaded[family.vae_class] == {torch.float32}
    before, after = (everything(run) for run in runs.values())
    assert before.keys() == after.keys()
    assert [name for name in before if before[name].dtype != after[name].dtype] == []
    assert [name for name in before if not torch.equal(before[name], after[name])] == []
    first, second = runs.values()
    assert first.fingerprints == second.fingerprints, "a run may be resumed, and a store or record used, either way"
    figures = [advance(run, 2) for run in (first, second)]
    assert figures[0] == figures[1] and figures[0][1]["margin_mean"] != 0
    assert all(torch.equal(value, weights(second)[name]) for name, value in weights(first).items())


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", [pytest.param(one, marks=[pytest.mark.slow] * (one not in ("sd15", "flux-dev"))) for one in KINDS]
)
def test_a_store_and_its_record_of_files_in_half_precision(world, tmp_path, monkeypatch, loaded, kind):
    """Encoding never loads the denoiser, and recording holds it as stored; both write what they wrote with all of it in fp32."""
    model, written = rewritten(world(kind), tmp_path / "model", torch.float16), []
    flags = ["--model", model, "--data", world("pairs"), "--max-pairs", "6", "--precision", "bf16", "--batch-size", "2"]
    config, _ = parse([*flags, *(SMALL if kind not in ("sd15", "sdxl") else ())])
    for way in ("as stored", "through fp32"):
        if way == "through fp32":
            monkeypatch.setattr(
                preparing, "load_model", lambda config, device, **given: ready.load_model(config, device)
            )
            monkeypatch.setattr(preparing, "cast", lambda *given, **how: ready.cast(*given))
        loaded.clear()
        preparing.encode_pairs(config, store := tmp_path / way, text_batch=4)
        encoding = dict(loaded)
        preparing.record_reference(config, store, 1)
        denoiser = loading.family_of(loading.read_index(Path(model))).denoiser_class
        assert (denoiser in encoding) == (way == "through fp32")
        assert loaded[denoiser] == {torch.float16 if way == "as stored" else torch.float32}
        written.append(contents(store))
    assert len(written[0]) > 3 and written[0] == written[1]


def contents(store: Path) -> dict[str, bytes]:
    """The tensors of a store and its record by file, and what the indices say of the model."""
    return {str(path.relative_to(store)): path.read_bytes() for path in sorted(store.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        ((), ()),
        (("--precision", "bf16"), ("text",)),
        (("--precision", "bf16", "--lora"), ("text", "denoiser")),
        (("--precision", "bf16-pure", "--lora"), ("text",)),
        (("--precision", "bf16", "--lora", "--lora-init", "a"), ("text",)),
        (("--precision", "bf16", "--lora", "--unet-init", "a"), ("text",)),
        (("--precision", "fp32", "--lora"), ()),
    ],
)
def test_what_is_trained_or_changed_first_is_in_fp32(flags, parts):
    config, _ = ready_config(flags)
    assert ready.held_narrow(config, torch.device("cpu")) == parts


def ready_config(flags):
    return parse(["--model", "m", "--data", "d", *flags])


def test_files_of_several_dtypes_are_read_in_fp32(world, tmp_path):
    model = rewritten(world("sd15"), tmp_path / "model", torch.bfloat16)
    (file,) = (Path(model) / "unet").glob("*.safetensors")
    state = load_file(file)
    first = min(state)
    save_file({**state, first: state[first].float()}, file, metadata={"format": "pt"})
    found = loading.load(model, narrow=("denoiser", "text"))
    assert {p.dtype for p in found.denoiser.parameters()} == {torch.float32}
    assert {p.dtype for p in found.text_encoders[0].parameters()} == {torch.bfloat16}


PEAK = """
import sys
from diffusers import SD3Transformer2DModel
from dpo.models.parts import component

def peak():  # KiB of this program; getrusage would count the one that started it too
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM"))

component(SD3Transformer2DModel, sys.argv[1], "small")
base = peak()
component(SD3Transformer2DModel, sys.argv[1], "large", narrow=sys.argv[2] == "True")
print(peak() - base)
"""


@pytest.mark.slow
def test_the_peak_of_the_host_s_memory_is_about_what_the_file_takes(tmp_path):
    """Measured by the kernel in a process of its own, over what libraries and a small model take."""
    from diffusers import SD3Transformer2DModel

    sizes = {}
    for name, layers in (("small", 1), ("large", 4)):
        model = SD3Transformer2DModel(num_layers=layers, attention_head_dim=64, num_attention_heads=16, joint_attention_dim=64,
                                      caption_projection_dim=1024, pooled_projection_dim=64, pos_embed_max_size=8)  # fmt: skip
        model.to(torch.bfloat16).save_pretrained(tmp_path / name)
        sizes[name] = sum(p.numel() * 2 for p in model.parameters()) / 1024
    peaks = []
    for narrow in (False, True):
        words = [sys.executable, "-c", PEAK, str(tmp_path), str(narrow)]
        found = subprocess.run(
            words, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
        peaks.append(int(found.stdout) / sizes["large"])
    assert sizes["large"] > 200_000 and peaks[0] > 1.9, peaks
    assert peaks[1] < peaks[0] - 0.8, peaks
