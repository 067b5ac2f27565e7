"""dpo.exporting.extracting: a LoRA from two models is what was merged, the best of its rank, and what diffusers loads."""

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.exporting import extracting, sources, table
from dpo.exporting.asked import Asked as Exported
from dpo.exporting.extracting import Asked, Extraction, Row, extract
from dpo.exporting.pieces import of_tensors
from dpo.exporting.sources import Side, coarser, opened
from dpo.exporting.work import export
from dpo.models import lora_files
from dpo.models.adapter import Factors, merge_into
from dpo.models.fingerprint import checksum
from dpo.models.load import load
from dpo.settings import config as settings
from tests.help.handed import header, lora_run
from tests.help.ldm import write_single_file


@pytest.fixture(scope="module")
def merged(world, tmp_path_factory):
    """By kind: the adapter of a LoRA run, and its base with it as one file."""
    root = tmp_path_factory.mktemp("merged")

    @functools.cache
    def made(kind):
        adapter = lora_run(root / kind / "run", world(kind))
        return adapter, export(Exported(str(root / kind / "run"), "single-file", merge=True))

    return made


def changed(base, folder, **changes):
    """A copy of the pipeline `base` in which tensors of a part are changed: PART__NAME=function."""
    shutil.copytree(base, folder)
    for place, change in changes.items():
        part, _, name = place.partition("__")
        file = next((folder / part).glob("*.safetensors"))
        state = load_file(file)
        names = [key for key in state if key.endswith(name.replace("__", "."))]
        assert names, name
        save_file(state | {key: change(state[key]) for key in names}, file, metadata={"format": "pt"})
    return str(folder)


def noise(size):
    generator = torch.Generator().manual_seed(5)
    return lambda value: value + torch.randn(value.shape, generator=generator) * size


@pytest.mark.long
@pytest.mark.parametrize(("kind", "kohya"), [("sd15", False), pytest.param("sdxl", True, marks=pytest.mark.slow)])
def test_a_merged_lora_comes_out_at_its_own_rank(world, merged, tmp_path, kind, kohya):
    adapter, aligned = merged(kind)
    path = tmp_path / "lora.safetensors"
    found = extract(Asked(str(aligned), world(kind), path, energy=1 - 1e-9, kohya=kohya, device="cpu"))
    assert {row.layer for row in found.rows} == adapter.keys() and found.left == {}
    assert {row.rank for row in found.rows} == {3} and found.kept > 1 - 1e-9
    plain = load(world(kind))
    read = lora_files.read(path, plain.denoiser, plain.family)
    for name, factors in adapter.items():
        product = factors.up.flatten(1).double() @ factors.down.flatten(1).double() * factors.alpha / factors.rank
        again = read[name].up.flatten(1).double() @ read[name].down.flatten(1).double()
        assert (again - product).norm() < 2e-6 * product.norm()  # the merged weights are rounded to fp32


@pytest.mark.long
def test_the_file_changes_the_unet_in_diffusers_as_it_should(world, merged, tmp_path):
    from diffusers import DiffusionPipeline

    _, aligned = merged("sd15")
    wanted = load(str(aligned), single_file_config=world("sd15")).denoiser.state_dict()
    for kohya in (False, True):  # every layer has a rank of its own in both
        path = tmp_path / f"{kohya}.safetensors"
        found = extract(Asked(str(aligned), world("sd15"), path, energy=0.8, kohya=kohya, device="cpu"))
        assert len({row.rank for row in found.rows}) > 1
        pipe = DiffusionPipeline.from_pretrained(world("sd15"))
        before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        pipe.load_lora_weights(str(tmp_path), weight_name=path.name)
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        after = pipe.unet.state_dict()
        for row in found.rows:
            name = f"{row.layer}.weight"
            error = (after[name] - wanted[name]).norm() / (wanted[name] - before[name]).norm()
            assert float(error) == pytest.approx((1 - row.kept) ** 0.5, abs=1e-5), "the root of the discarded squares"


@pytest.mark.long
def test_full_rank_rebuilds_a_full_fine_tune_but_for_what_a_lora_cannot_hold(world, tmp_path):
    parts = {"unet__to_q__weight": noise(1e-3), "unet__conv1__weight": noise(1e-3)}
    beyond = {
        "unet__conv_in__weight": noise(1e-3),
        "unet__norm1__weight": noise(1e-4),
        "unet__conv_out__bias": noise(1e-4),
    }
    aligned = changed(world("sd15"), tmp_path / "aligned", **parts, **beyond)
    found = extract(Asked(aligned, world("sd15"), tmp_path / "lora.safetensors", rank=1000, device="cpu"))
    assert all(row.kept == pytest.approx(1) for row in found.rows)
    assert found.left.keys() == {"conv_in", "norms", "biases"}
    assert found.kept + sum(found.left.values()) / found.total == pytest.approx(1)
    plain, wanted = load(world("sd15")), load(aligned).denoiser.state_dict()
    merge_into(plain.denoiser, lora_files.read(found.path, plain.denoiser, plain.family))
    for row in found.rows:
        one, other = plain.denoiser.state_dict()[f"{row.layer}.weight"], wanted[f"{row.layer}.weight"]
        assert (one - other).abs().max() <= 2 * torch.finfo(torch.float32).eps * other.abs().max()
    said = table.lines(found, None)
    assert "The LoRA leaves out conv_in" in "\n".join(said) and said[0].split()[0] == "block"
    assert len(table.table(found).splitlines()) == 1 + len(found.rows)


def test_what_a_folder_says_of_turbo(world):
    assert [opened(world(kind), None).turbo for kind in ("sdxl", "sdxl-turbo")] == [False, True]


@pytest.mark.parametrize(("aligned", "base"), [(False, False), (True, False), (False, True)])
def test_the_header_says_whether_one_of_the_two_is_turbo(tmp_path, aligned, base):
    widths = {f"down_blocks.{i}.resnets.0.conv2.weight": torch.zeros(320 * 2**i, 1) for i in range(3)}
    unet = of_tensors(widths | {"mid_block.attn2.to_k.weight": torch.zeros(1, 2048)})
    factors = {"mid_block.x": Factors(torch.zeros(1, 1), torch.zeros(1, 1), 1.0)}
    sides = (Side("x", unet, {}, {}, 0, turbo=turbo) for turbo in (aligned, base))
    extracting._write(Asked("x", "y", tmp_path / "l.safetensors", rank=1), factors, *sides)
    said = "stable-diffusion-xl-turbo-v1/lora" if aligned or base else "stable-diffusion-xl-v1-base/lora"
    assert header(tmp_path / "l.safetensors")["modelspec.architecture"] == said


@pytest.mark.parametrize("kind", ["stable-diffusion-xl-turbo-v1", "stable-diffusion-xl-v1-base", None])
def test_a_file_says_in_its_header_that_it_is_turbo(tmp_path, monkeypatch, kind):
    prefix, told = "model.diffusion_model.", {} if kind is None else {"modelspec.architecture": kind}
    names = (f"{prefix}label_emb.0.0.weight", "conditioner.embedders.1.x")
    save_file({name: torch.zeros(1) for name in names}, tmp_path / "a.safetensors", told)
    monkeypatch.setattr(sources, "_in_diffusers", lambda unet, said: unet)
    assert opened(str(tmp_path / "a.safetensors"), None).turbo == (kind == "stable-diffusion-xl-turbo-v1")


def test_where_no_part_but_the_unet_is_there_nothing_says_that_the_base_is_what_was_trained_from():
    """Else most of the change could be rounding, and nobody would be warned."""
    unet = of_tensors({"a.weight": torch.zeros(2)})
    vae = of_tensors({"first_stage_model.a": torch.ones(2), "first_stage_model.b.position_ids": torch.ones(2)})
    whole, alone = (Side("x", unet, others, {}, 0) for others in (vae, {}))
    assert sources.check_alike(whole, whole) and not sources.check_alike(whole, alone)
    assert not sources.check_alike(*(whole._replace(others={"position_ids": vae["first_stage_model.a"]}),) * 2)


def test_a_sum_that_is_rounded_is_not_called_cut_off():
    row = Row("mid_block.x", (2, 2), 0.1, (1, 1, 2), 2, 1 - 2**-53, 1.0, 0.0)
    for energy, kept, cut in ((1.0, row.kept, False), (1.0, 1 - 1e-6, True)):
        said = table.lines(Extraction(Path("x"), [row._replace(kept=kept)], {}, 1.0), energy)
        assert any("--max-rank cut it off" in line for line in said) == cut


@pytest.mark.slow
def test_ranks_that_are_cut_off_and_rounding_are_told(world, tmp_path):
    aligned = changed(
        world("sd15"), tmp_path / "aligned", unet__to_q__weight=lambda value: noise(1e-4)(value).half().float()
    )
    half = export(Exported(aligned, "single-file", tmp_path / "half.safetensors", fp16=True))
    found = extract(Asked(str(half), world("sd15"), tmp_path / "l.safetensors", energy=0.99, max_rank=2, device="cpu"))
    said = "\n".join(table.lines(found, 0.99))
    assert coarser(torch.float16, torch.bfloat16, torch.float32) == torch.bfloat16
    assert max(row.rank for row in found.rows) == 2 and "--max-rank cut them off" in said
    assert "rounding to half precision" in said and any(row.floor > 0.9 for row in found.rows)


@pytest.mark.slow
def test_a_base_in_half_precision_that_was_trained_from_is_exact(world, tmp_path):
    halved = {f"{part}__": lambda value: value.half().float() for part in ("unet", "vae", "text_encoder")}
    trained = changed(world("sd15"), tmp_path / "trained", **halved, unet__to_q__weight=noise(1e-4))
    found = extract(Asked(trained, str(halved_base(world, tmp_path)), tmp_path / "m.safetensors", rank=2, device="cpu"))
    assert max(row.floor for row in found.rows) < 1e-3, (
        "the base in half precision is what was trained from, to the bit"
    )


def halved_base(world, folder):
    return export(Exported(world("sd15"), "single-file", folder / "base.safetensors", fp16=True))


@pytest.mark.slow
def test_a_half_of_the_same_vae_and_text_encoder_is_no_change(world, tmp_path):
    half = export(Exported(world("sdxl"), "single-file", tmp_path / "half.safetensors", fp16=True))
    found = extract(Asked(str(half), world("sdxl"), tmp_path / "lora.safetensors", rank=1, device="cpu"))
    assert found.total > 0, "rounding alone: the other parts were not refused"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({}, "differ in nothing: there is nothing to extract"),
        ({"unet__conv_in__bias": noise(1)}, r"differ only in what the LoRA leaves out \(biases\)"),
        ({"vae__decoder__conv_in__bias": noise(1e-3)}, "has another VAE than --base .* cannot hold that"),
        ({"text_encoder__final_layer_norm__bias": noise(1e-3)}, "has another text encoder than --base"),
        ({"unet__conv_out__bias": lambda value: value * float("nan")}, "conv_out.bias has NaN or infinity"),
    ],
)
def test_models_that_give_no_lora_are_refused(world, tmp_path, change, words):
    aligned = changed(world("sd15"), tmp_path / "aligned", **change)
    with pytest.raises(UserError, match=words):
        extract(Asked(aligned, world("sd15"), tmp_path / "lora.safetensors", rank=2, device="cpu"))
    assert not (tmp_path / "lora.safetensors").exists()


def test_another_architecture_and_a_lora_are_refused(world, merged, tmp_path):
    with pytest.raises(
        UserError, match="of another architecture than --base .* name the model that it was trained from"
    ):
        extract(Asked(world("sdxl"), world("sd15"), tmp_path / "lora.safetensors", rank=2, device="cpu"))
    for lora in (
        merged("sd15")[1].parent / "run",
        merged("sd15")[1].parent / "run" / "pytorch_lora_weights.safetensors",
    ):
        with pytest.raises(UserError, match="holds a LoRA, no whole model"):
            opened(str(lora), None)
    (tmp_path / "config.toml").write_text('[model]\nmodel = "a"\nunet_init = "b"\n', encoding="utf-8")
    with pytest.raises(UserError, match="that run began with --unet-init b, which is not in the files of its model"):
        opened(f"start:{tmp_path}", None)
    state = load_file(merged("sd15")[1])
    save_file(
        {name.replace("input_blocks.1.", "input_blocks.9."): value for name, value in state.items()},
        tmp_path / "odd.safetensors",
    )
    with pytest.raises(UserError, match="of an architecture that this trainer does not know"):
        opened(str(tmp_path / "odd.safetensors"), None)


def warned(caplog):
    """The warnings: the rest says how far a slow machine is."""
    return [record.message for record in caplog.records if record.levelname == "WARNING"]


def as_run(folder, model, made_from):
    """Makes a pipeline's folder that of a run which began with `model`."""
    config = settings.change(settings.Config(), model=str(model), data="pairs", output=str(folder))
    (Path(folder) / "config.toml").write_text(settings.to_toml(config), "utf-8")
    (Path(folder) / "summary.json").write_text(json.dumps({"made_from": made_from}), "utf-8")


@pytest.mark.long
@pytest.mark.parametrize("known", [True, False], ids=["by content", "by place"])
def test_a_base_that_the_run_did_not_begin_with_is_warned_of_and_one_that_began_with_it_is_refused(
    world, tmp_path, caplog, known
):
    base = world("sd15")
    other = changed(base, tmp_path / "other", unet__to_k__weight=noise(1e-2))
    run = changed(base, tmp_path / "run", unet__to_q__weight=noise(1e-3))
    as_run(run, base, {"model": checksum(load(base).denoiser)} if known else {})
    copy = shutil.copytree(base, tmp_path / "copy")  # another place with the same weights
    asked = functools.partial(Asked, rank=1, device="cpu")
    extract(asked(run, str(copy) if known else base, tmp_path / "1.safetensors"))
    assert warned(caplog) == []
    extract(asked(run, other, tmp_path / "2.safetensors"))
    said = f"{run} began with {base}, not with --base {other}: the LoRA also holds what these two differ in"
    assert warned(caplog) == [said]
    with pytest.raises(UserError, match=f"{base} is what --base {run} began with: the two are swapped"):
        extract(asked(base, run, tmp_path / "3.safetensors"))


def test_one_file_says_its_noise_and_target_itself(world, tmp_path):
    path = write_single_file(Path(world("sd15")), tmp_path / "one.safetensors")
    assert opened(str(path), None).scheduler == {}
    state = load_file(path)
    save_file(state | {name: torch.zeros(0) for name in ("v_pred", "ztsnr")}, path)
    assert opened(str(path), None).scheduler == {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    save_file(state | {"edm_mean": torch.zeros(4)}, path)  # is not trained here, and has a difference all the same
    assert opened(str(path), None).scheduler == {}


@pytest.mark.slow
def test_two_files_are_read_as_two_folders_are(world, merged, tmp_path):
    adapter, aligned = merged("sdxl")
    base = export(Exported(world("sdxl"), "single-file", tmp_path / "base.safetensors"))
    found = extract(Asked(str(aligned), str(base), tmp_path / "lora.safetensors", rank=3, device="cpu"))
    assert {row.layer for row in found.rows} == adapter.keys()
    assert opened(str(base), None).denoiser.keys() == opened(world("sdxl"), None).denoiser.keys()
    assert Path(found.path).is_file()
