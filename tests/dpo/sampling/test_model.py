"""dpo.sampling.model: folders, LoRAs, training outputs; the fingerprint tells any two apart."""

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.drawing import draw
from dpo.models import ready
from dpo.models.fingerprint import checksum
from dpo.models.ready import load_named
from dpo.pages.folder import ADAPTER_FILE
from dpo.sampling import model as sampling
from dpo.sampling.model import opened, read
from dpo.settings.config import Config, change, to_toml
from dpo.tiny.paths import pipeline_path
from tests.help.commands import SMALL
from tests.runs.test_narrow import rewritten

CPU = torch.device("cpu")


def find(name, **options):
    return opened(str(name), device=CPU, **{"precision": "fp32", "lora_base": None, "cache_dir": None} | options)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, world):
    """A run's LoRA on the tiny SD 1.5."""
    folder = tmp_path_factory.mktemp("run") / "out"
    from dpo.train import main

    words = ["--model", world("sd15"), "--data", world("pairs"), "--output", str(folder), "--lora", "--steps", "2"]
    assert main([*words, "--batch-size", "4", "--learning-rate", "0.01", "--no-samples", *SMALL[:4]]) == 0
    return folder


def weight(found):
    return dict(found.pipe.unet.state_dict())


def differ(one, other):
    return any(not torch.equal(value, other[name]) for name, value in one.items())


@pytest.mark.long
def test_the_embedded_model_and_defaults():
    found = find("embedded")
    assert found.side == 64 and found.steps == 50 and found.guidance == 7.5
    assert found.fingerprint == find(pipeline_path()).fingerprint


def test_turbo_draws_in_few_steps_without_guidance(world):
    found = find(world("sdxl-turbo"))
    assert found.steps == 4 and found.guidance == 0


@pytest.mark.parametrize(("kind", "steps"), [("sd15", 50), ("sdxl-turbo", 4), ("sd35", 50)])
def test_the_files_say_how_many_steps_and_not_a_name(world, tmp_path, kind, steps):
    """--timesteps is a word of the training. The base of a run's LoRA is asked as well."""
    (named := tmp_path / "myMerge-Turbo").symlink_to(world(kind))
    assert find(named).steps == steps
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(to_toml(change(Config(), model=str(named))), encoding="utf-8")
    assert find(f"start:{tmp_path / 'run'}").steps == steps


def test_files_in_half_precision_are_read_in_fp32_whatever_the_device(tmp_path, world):
    """A GPU's run holds frozen weights narrow; here they are compared with what a run began with, merged and fingerprinted."""
    model = rewritten(world("sd15"), tmp_path / "model", torch.bfloat16)
    for device in (CPU, torch.device("cuda")):
        _, found = read(model, device=device, lora_base=None, cache_dir=None)
        for part in (found.denoiser, found.vae, *found.text_encoders):
            assert {p.dtype for p in part.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("kind", "stored"), [("sdxl", torch.float16), ("sd15", torch.bfloat16), ("sd35", torch.float16)]
)
def test_what_is_drawn_in_half_precision_is_held_as_stored_and_is_the_same(tmp_path, world, kind, stored, monkeypatch):
    """The same model by its fingerprint, and the same weights, as by way of fp32."""
    model = rewritten(world(kind), tmp_path / "model", stored)
    loading, kept = ready.load, []
    monkeypatch.setattr(
        sampling, "checksum", lambda *parts, dtype: kept.append(parts[0].dtype) or checksum(*parts, dtype=dtype)
    )
    narrow = find(model, precision="bf16")
    monkeypatch.setattr(ready, "load", lambda *named, narrow, **how: loading(*named, **how))
    wide = find(model, precision="bf16")
    assert kept == [stored, torch.float32]
    assert narrow.fingerprint == wide.fingerprint == find(model).fingerprint
    for one, other in zip(narrow.pipe.components.values(), wide.pipe.components.values(), strict=True):
        if isinstance(one, torch.nn.Module):
            values = other.state_dict()
            assert all(torch.equal(value, values[name]) for name, value in one.state_dict().items())


@pytest.mark.long
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_sdxls_vae_stays_in_fp32(world, precision):
    xl, sd = find(world("sdxl"), precision=precision), find(world("sd15"), precision=precision)
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    assert (xl.vae_precision, sd.vae_precision) == ("fp32", precision)
    assert (xl.pipe.unet.dtype, xl.pipe.vae.dtype, xl.pipe.text_encoder.dtype) == (half, torch.float32, half)
    assert (sd.pipe.unet.dtype, sd.pipe.vae.dtype) == (half, half)
    assert xl.fingerprint == find(world("sdxl")).fingerprint


def test_one_changed_weight_is_another_model(world, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(world("sd15"), folder)
    before = find(folder).fingerprint
    path = next((folder / "vae").glob("*.safetensors"))
    tensors = load_file(path)
    name = max(tensors, key=lambda key: tensors[key].numel())
    tensors[name].view(-1)[101] += 1e-3  # not one of a few values that are looked at
    save_file(tensors, path, {"format": "pt"})
    assert find(folder).fingerprint != before


@pytest.mark.long
def test_a_runs_lora_finds_its_base(trained, world):
    found = find(trained)
    assert differ(weight(found), weight(find(world("sd15"))))
    from diffusers import DiffusionPipeline

    plain = DiffusionPipeline.from_pretrained(world("sd15"))
    plain.load_lora_weights(str(trained), weight_name=ADAPTER_FILE)
    plain.fuse_lora()
    plain.unload_lora_weights()
    own = weight(found)
    for name, value in plain.unet.state_dict().items():
        torch.testing.assert_close(own[name], value, rtol=1e-5, atol=1e-6)


@pytest.mark.long
def test_a_lora_alone_wants_its_base(trained, world, tmp_path):
    file = tmp_path / "pytorch_lora_weights.safetensors"
    shutil.copy(trained / file.name, file)
    for name in (file, tmp_path):
        with pytest.raises(UserError, match="--lora-base"):
            find(name)
        assert find(name, lora_base=world("sd15")).fingerprint == find(trained).fingerprint
    with pytest.raises(UserError) as refused:
        find(file, lora_base=world("sdxl"))
    assert "--lora-init" not in str(refused.value) and "the LoRA" in str(refused.value)


@pytest.mark.long
def test_a_run_that_began_elsewhere_has_its_starting_unet(trained, world, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    start = load_named(change(Config(), model=world("sd15"), data="x")).denoiser
    with torch.no_grad():
        start.conv_out.bias.add_(1.0)
    start.save_pretrained(tmp_path / "unet")
    config = change(Config(), model=world("sd15"), data="x", unet_init=str(tmp_path / "unet"), lora_init="gone")
    (folder / "config.toml").write_text(to_toml(config), "utf-8")
    assert torch.equal(find(folder).pipe.unet.conv_out.bias, start.conv_out.bias)


@pytest.mark.parametrize(
    ("content", "words"),
    [("model = 3", ["model"]), ("no toml", ["not TOML"]), ("[model]\nmodel = 'gone/for ever'", ["gone/for ever"])],
)
def test_a_runs_broken_config_is_one_line(trained, tmp_path, content, words):
    folder = tmp_path / "run"
    shutil.copytree(trained, folder)
    (folder / "config.toml").write_text(content, "utf-8")
    with pytest.raises(UserError) as refused:
        find(folder)
    assert [word for word in words if word not in str(refused.value)] == [] and "\n" not in str(refused.value)


def test_a_file_that_is_none_is_one_line(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"no")
    with pytest.raises(UserError, match="fetch it again"):
        find(path)
    with pytest.raises(UserError, match="no such model"):
        find(tmp_path / "nowhere at all")


def altered(folder, part="unet"):
    """Changes one number of a saved model's weights in place; what puts the file back."""
    file = folder / part / "diffusion_pytorch_model.safetensors"
    kept, state = file.read_bytes(), load_file(file)
    name = sorted(state)[0]
    state[name].view(-1)[1] += 1e-3
    save_file(state, file, {"format": "pt"})
    return lambda: file.write_bytes(kept)


@pytest.mark.long
def test_the_start_of_a_run_is_what_it_began_with_by_content(tmp_path, world):
    """Files that were changed since are not taken for the start, nor for the model under a run's LoRA."""
    from dpo.train import main

    base, unet, folder = tmp_path / "base", tmp_path / "other", tmp_path / "run"
    shutil.copytree(world("sd15"), base)
    shutil.copytree(base / "unet", unet / "unet")
    altered(unet)
    words = ["--model", str(base), "--unet-init", str(unet / "unet"), "--data", world("pairs"), "--steps", "1"]
    assert main([*words, "--lora", "--output", str(folder), "--batch-size", "4", "--no-samples", *SMALL[:4]]) == 0
    start = f"start:{folder}"
    assert not differ(weight(find(start)), load_file(unet / "unet" / "diffusion_pytorch_model.safetensors"))
    put_back = altered(unet)
    with pytest.raises(UserError, match="--unet-init and --lora-init named has other weights now"):
        find(start)
    put_back()
    for part in ("unet", "vae"):
        put_back = altered(base, part)
        for name in (start, folder):
            with pytest.raises(UserError, match="has other weights now than the run in"):
                find(name)
        put_back()
    find(start), find(folder)


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "half", "vae"), [("sd15", "fp16", "fp16"), ("sdxl", "fp16", "fp32"), ("sd35", "bf16", "bf16")]
)
def test_the_precision_that_is_left_open_is_said_as_it_was_decided(world, kind, half, vae):
    """On a GPU: what the protocol of a set of images records is what drew it."""
    found = find(world(kind), precision="auto")
    assert (found.precision, found.vae_precision) == (half, vae)
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[half]
    assert next(draw.network(found.pipe).parameters()).dtype == dtype


def test_text_encoders_that_overflow_are_not_asked_for_fp16(world):
    with pytest.raises(UserError, match="--precision fp16: the text encoders of family sd3 overflow"):
        find(world("sd35"), precision="fp16")


def test_a_finished_run_is_drawn_with_captions_as_long_as_in_training(world, tmp_path):
    """A whole pipeline says nothing of it: the settings beside it do."""
    folder = shutil.copytree(world("sd35"), tmp_path / "run")
    assert find(folder).pipe.captions_as_trained == {"max_sequence_length": 256}
    asked = change(Config(), model="anything", text_tokens=64)
    (folder / "config.toml").write_text(to_toml(asked))
    assert find(folder).pipe.captions_as_trained == {"max_sequence_length": 64}


def of_run(place, **values):
    """The config.toml of a run, beside what is in a folder already."""
    (place / "config.toml").write_text(to_toml(change(Config(), **values)))
    return str(place)


@pytest.fixture
def loras(tmp_path):
    """Two LoRAs of runs of one model, that were trained with captions of two lengths, one in four steps."""
    for name, values in {"a": {"text_tokens": 32, "timesteps": "turbo"}, "b": {"text_tokens": 64}}.items():
        (tmp_path / name).mkdir()
        save_file({"transformer.x.lora_A.weight": torch.zeros(1, 1)}, tmp_path / name / ADAPTER_FILE)
        of_run(tmp_path / name, model="m", lora=True, **values)
    return [str(tmp_path / name) for name in "ab"]


def test_a_lora_on_a_base_that_lies_elsewhere_is_asked_as_it_was_trained(loras, tmp_path):
    for base in (None, "elsewhere"):
        found = sampling.config_of_lora("a", Path(loras[0]) / ADAPTER_FILE, base)
        assert (found["text_tokens"], found["timesteps"]) == (32, "turbo") and found["model"] == (base or "m")
    (tmp_path / "a" / "config.toml").write_text('[general]\nother_program = "yes"\n')
    assert sampling.config_of_lora("a", Path(loras[0]) / ADAPTER_FILE, "elsewhere") == {"model": "elsewhere"}


def test_what_is_compared_has_captions_of_one_length(loras, world):
    plain = world("sd35")
    assert sampling.captions_alike([plain, loras[0]], None, None) == 32
    assert sampling.captions_alike([plain, plain], None, None) is None
    assert sampling.as_trained([plain, *loras], None, None)["timesteps"] == {"turbo"}
    with pytest.raises(UserError, match="captions of 32 and of 64 tokens.* with --text-tokens how many"):
        sampling.captions_alike([plain, *loras], None, None)


def test_a_model_whose_name_alone_says_turbo_is_warned_of(world, tmp_path, caplog):
    folder = shutil.copytree(world("sd35"), tmp_path / "sd35-large-turbo")
    found = find(folder)
    assert (found.steps, found.guidance) == (50, 7.0)
    assert (
        "is named Turbo, which neither its files nor a run says: if it was distilled, draw it with --steps 4"
        in caplog.text
    )
    found = find(folder, few_steps=True)
    assert (found.steps, found.guidance) == (4, 0.0) and caplog.text.count("is named Turbo") == 1


def test_the_models_of_runs_in_few_steps_are_those(loras):
    assert sampling.few_steps(["m", *loras], None, None) == {"m"} and not sampling.few_steps(
        ["m", loras[1]], None, None
    )
