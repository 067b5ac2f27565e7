"""dpo.models.lora_files: LoRA files of every layout give what they add; other files are refused in one line."""

import copy
import json
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.models import lora, lora_files
from dpo.models.adapter import Adapter
from dpo.models.family import Model
from dpo.models.load import load
from dpo.models.save import save_lora
from tests.dpo.models.test_adapter import added
from tests.dpo.models.test_lora import EVERYTHING, TARGETS, train

FILE = "pytorch_lora_weights.safetensors"


def trained(model: Model, **options) -> torch.nn.Module:
    unet = copy.deepcopy(model.denoiser)
    settings = {"rank": 4, "alpha": 6.0, "target_modules": TARGETS, "dropout": 0.0, "seed": 0} | options
    lora.add(unet, **settings)
    train(unet)
    return unet


def deltas(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """What the adapter on `unet` adds to each layer, by peft."""
    layers = set(lora.adapter_layers(unet))
    return {name: module.get_delta_weight("default") for name, module in unet.named_modules() if module in layers}


def check(found: Adapter, unet: torch.nn.Module) -> None:
    wanted = deltas(unet)
    assert found.keys() == wanted.keys()
    for name, factors in found.items():
        torch.testing.assert_close(added(factors).float(), wanted[name], rtol=1e-5, atol=1e-6)


def old_diffusers(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The names of diffusers' training scripts before peft; they had no alpha but the rank."""
    words = {"to_out.0.": "to_out.", "lora_A": "down", "lora_B": "up"}
    named = {}
    for name, value in lora.state(unet).items():
        for word, other in words.items():
            name = name.replace(word, other)
        stem, _, part = name.removesuffix(".weight").rpartition(".")
        attention, _, projection = stem.rpartition(".")
        named[f"unet.{attention}.processor.{projection}_lora.{part}.weight"] = value
    return named


def write(layout: str, model: Model, unet: torch.nn.Module, folder: Path) -> Path:
    """The adapter in `folder`, in one of the layouts that people have; what to name for it."""
    folder.mkdir()
    settings = {"r": 4, "lora_alpha": 6.0, "rank_pattern": {}, "alpha_pattern": {}}
    peft_names = {f"unet.{name}": value for name, value in lora.state(unet).items()}
    if layout in ("ours", "kohya"):
        save_lora(model, unet, folder, layout="diffusers" if layout == "ours" else "kohya")
    elif layout == "peft":
        save_file(
            {f"base_model.model.{name}": value for name, value in lora.state(unet).items()},
            folder / "adapter_model.safetensors",
        )
        (folder / "adapter_config.json").write_text(json.dumps(settings))
    elif layout == "diffusers with metadata":
        told = json.dumps({f"unet.{name}": value for name, value in settings.items()})
        save_file(peft_names, folder / FILE, metadata={"lora_adapter_metadata": told})
    elif layout == "diffusers with alpha tensors":
        stems = {name.partition(".lora_")[0] for name in peft_names}
        save_file(peft_names | {f"{stem}.alpha": torch.tensor(6.0) for stem in stems}, folder / FILE)
    elif layout == "old diffusers":
        save_file(old_diffusers(unet), folder / "some-name.safetensors")
    return folder


@pytest.fixture(scope="module")
def models(world) -> dict[str, Model]:
    return {kind: load(world(kind)) for kind in ("sd15", "sdxl")}


LAYOUTS = ("ours", "kohya", "peft", "diffusers with metadata", "diffusers with alpha tensors", "old diffusers")


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_what_was_trained(models, tmp_path, kind, layout):
    model = models[kind]
    unet = trained(model, alpha=4.0 if layout == "old diffusers" else 6.0)
    place = lora_files.locate(str(write(layout, model, unet, tmp_path / "lora")))
    check(lora_files.read(place, model.denoiser, model.family), unet)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("layout", ["ours", "kohya"])
def test_every_layer_of_a_unet(models, tmp_path, kind, layout):
    model = models[kind]
    unet = trained(model, target_modules=EVERYTHING)
    place = lora_files.locate(str(write(layout, model, unet, tmp_path / "lora")))
    check(lora_files.read(place, model.denoiser, model.family), unet)


def test_layers_of_different_rank_and_alpha(models, tmp_path):
    """As kohya's tools write them, and as peft's patterns say."""
    model = models["sd15"]
    unet = trained(model)
    save_lora(model, unet, tmp_path, layout="kohya")
    stored = load_file(tmp_path / FILE)
    stem = next(name for name in stored if name.endswith("attn1_to_q.alpha")).removesuffix(".alpha")
    stored[f"{stem}.alpha"] = torch.tensor(1.0)
    stored[f"{stem}.lora_down.weight"] = stored[f"{stem}.lora_down.weight"][:2].clone()
    stored[f"{stem}.lora_up.weight"] = stored[f"{stem}.lora_up.weight"][:, :2].clone()
    save_file(stored, tmp_path / FILE)
    found = lora_files.read(tmp_path / FILE, model.denoiser, model.family)
    (name,) = (name for name in found if f"lora_unet_{name.replace('.', '_')}" == stem)
    assert {(f.rank, f.alpha) for other, f in found.items() if other != name} == {(4, 6.0)}
    wanted = 0.5 * stored[f"{stem}.lora_up.weight"] @ stored[f"{stem}.lora_down.weight"]
    torch.testing.assert_close(added(found[name]).float(), wanted)

    told = {"r": 4, "lora_alpha": 6.0, "use_rslora": True, "rank_pattern": {}, "alpha_pattern": {"attn2.to_v": 1.0}}
    write("peft", model, unet, tmp_path / "peft")
    (tmp_path / "peft" / "adapter_config.json").write_text(json.dumps(told))
    found = lora_files.read(lora_files.locate(str(tmp_path / "peft")), model.denoiser, model.family)
    for name, factors in found.items():
        assert factors.alpha == (1.0 if name.endswith("attn2.to_v") else 6.0) * 2  # alpha / sqrt(r) = 2 alpha / r


def test_the_text_encoders_part_is_left_out_aloud(models, tmp_path, caplog):
    model = models["sd15"]
    unet = trained(model)
    for layout, name in (
        ("ours", "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_{}.weight"),
        ("kohya", "lora_te_text_model_encoder_layers_0_self_attn_q_proj.{}.weight"),
    ):
        place = write(layout, model, unet, tmp_path / layout) / FILE
        words = ("A", "B") if layout == "ours" else ("lora_down", "lora_up")
        save_file(load_file(place) | {name.format(word): torch.ones(4, 4) for word in words}, place)
        caplog.clear()
        check(lora_files.read(place, model.denoiser, model.family), unet)
        assert "changes the text encoder too: that part is left out" in caplog.text


# --- what is refused ------------------------------------------------------------------------------------------------


def refused(path: Path, model: Model) -> str:
    with pytest.raises(UserError) as caught:
        lora_files.read(lora_files.locate(str(path)), model.denoiser, model.family)
    message = str(caught.value)
    assert "\n" not in message and "--lora-init" in message and len(message) < 500
    return message


@pytest.mark.long
def test_files_that_are_no_lora_of_this_model(models, pipelines, tmp_path):
    sd, sdxl = models["sd15"], models["sdxl"]
    unet = next((pipelines["sd15"] / "unet").glob("*.safetensors"))
    assert "is no LoRA of the UNet (conv_in.bias)" in refused(unet, sd)
    for layout in ("ours", "kohya", "peft"):
        place = write(layout, sdxl, trained(sdxl), tmp_path / layout)
        assert "another architecture" in refused(place, sd) or "is no LoRA" in refused(place, sd)
    bad = tmp_path / "bad.safetensors"
    bad.write_bytes(b"no tensors here")
    assert "cannot be read" in refused(bad, sd)
    save_file({}, bad)
    assert "no name at all" in refused(bad, sd)
    good = load_file(write("ours", sd, trained(sd), tmp_path / "sd") / FILE)
    half = {name: value for name, value in good.items() if not name.endswith("attn1.to_q.lora_B.weight")}
    save_file(half, bad)
    assert "first mismatch" in refused(bad, sd) and "attn1.to_q" in refused(bad, sd)
    save_file(good, bad, metadata={"lora_adapter_metadata": json.dumps({"unet.lora_alpha": "many"})})
    assert "no number for alpha" in refused(bad, sd)
    save_file(good, bad, metadata={"lora_adapter_metadata": "[1]"})
    assert "cannot be read" in refused(bad, sd)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("lora_unet_down_blocks_0_attentions_0_proj_in.dora_scale", "DoRA"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.hada_w1_a", "LoHa"),
        ("lora_unet_down_blocks_0_attentions_0_proj_in.lokr_w1", "LoKr"),
        ("lora_unet_down_blocks_0_resnets_0_conv1.lora_mid.weight", "LoCon"),
        ("lora_unet_conv_in.diff", "difference"),
        ("unet.conv_in.lora_B.bias", "biases"),
    ],
)
def test_adapters_of_another_kind(models, tmp_path, name, kind):
    save_file({name: torch.zeros(2, 2)}, tmp_path / "a.safetensors")
    assert kind in refused(tmp_path / "a.safetensors", models["sd15"])


@pytest.mark.parametrize(
    ("held", "fetched"),
    [
        ([FILE, "other.safetensors"], [FILE]),
        (["adapter_config.json", "adapter_model.safetensors"], ["adapter_model.safetensors", "adapter_config.json"]),
        (["README.md", "style.safetensors", "old/style.safetensors"], ["style.safetensors"]),
    ],
)
def test_a_lora_on_the_hub(tmp_path, monkeypatch, held, fetched):
    got = []

    def download(repository, name, cache_dir):
        assert (repository, cache_dir) == ("owner/lora", "kept")
        if name not in held:
            raise huggingface_hub.errors.EntryNotFoundError("no such file")
        got.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", lambda repository: held)
    assert lora_files.locate("owner/lora", "kept") == tmp_path / fetched[0] and got == fetched
    with pytest.raises(UserError, match="holds no .safetensors file"):
        held[:] = ["README.md"]
        lora_files.locate("owner/lora", "kept")


def test_which_file_is_meant(tmp_path):
    (tmp_path / "model.bin").touch()
    for made, message in (([], "holds no .safetensors file"), (["a.safetensors", "b.safetensors"], "holds several")):
        for name in made:
            (tmp_path / name).touch()
        with pytest.raises(UserError, match=message):
            lora_files.locate(str(tmp_path))
    (tmp_path / FILE).touch()
    assert lora_files.locate(str(tmp_path)) == tmp_path / FILE
    assert lora_files.locate(str(tmp_path / "a.safetensors")) == tmp_path / "a.safetensors"
    for name, message in (
        (tmp_path / "model.bin", "is not a .safetensors file; convert"),
        (tmp_path / "nowhere" / "x", "no such folder or file, and not a hub id"),
        ("nobody/no-such-lora-on-earth", "cannot get --lora-init nobody/no-such-lora-on-earth from the hub"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            lora_files.locate(str(name))
        assert "\n" not in str(caught.value)
