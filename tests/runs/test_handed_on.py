"""From a ranking to the files of other programs: pairs, a LoRA of the tiny SDXL, and what diffusers, ComfyUI and A1111 read."""

import logging
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from dpo import export
from dpo.pages.folder import ADAPTER_FILE
from dpo.training import build
from tests.dpo.models.test_denoiser import run as predict
from tests.help.commands import SMALL, command, quietly
from tests.help.ldm import led_back, original_unet, weights_of
from tests.help.pairing import make_ranking, paired

TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1")
LORA = ("--lora", "--rank", 4, "--alpha", 6, "--learning-rate", 1e-2, "--warmup", 0, "--target-modules", *TARGETS)


def published_names(base: Path) -> set[str]:
    """The names in a LoRA's file on a UNet's layers TARGETS, as the programs' own tables of keys have them.

    ComfyUI (`model_lora_keys_unet`) and sd-scripts make a name of each layer of the original UNet: `lora_unet_`, then
    its name there with underscores; A1111 looks the same name up among the layers of that UNet.
    """
    weights = weights_of(base / "unet")
    originals = [name.removesuffix(".weight") for name in original_unet(weights, 2, 1) if name.endswith(".weight")]
    originals = [name.removeprefix("model.diffusion_model.") for name in originals]
    config = diffusers.UNet2DConditionModel.load_config(base / "unet")
    layer_of = led_back(originals, config)
    assert {f"{layer}.weight" for layer in layer_of.values()} == {name for name in weights if name.endswith(".weight")}
    stems = [f"lora_unet_{name.replace('.', '_')}" for name, layer in layer_of.items() if layer.endswith(TARGETS)]
    return {f"{stem}.{part}" for stem in stems for part in ("lora_down.weight", "lora_up.weight", "alpha")}


@torch.no_grad()
def by_diffusers(base: str, file: Path, caplog) -> torch.Tensor:
    """The prediction of diffusers' pipeline with a LoRA, none of whose keys is one too many."""
    pipe = diffusers.StableDiffusionXLPipeline.from_pretrained(base)
    log = logging.getLogger("diffusers")
    log.addHandler(caplog.handler)
    try:
        with caplog.at_level(logging.WARNING, logger="diffusers"):
            pipe.load_lora_weights(file.parent, weight_name=file.name)
    finally:
        log.removeHandler(caplog.handler)
    assert [line for line in caplog.messages if "unexpected keys" in line] == []
    return predict(pipe.unet.eval(), None)


@pytest.mark.slow
def test_from_a_ranking_to_the_files_of_other_programs(world, tmp_path, capsys, caplog, monkeypatch, pageless):
    ranking = make_ranking(tmp_path / "ranked", prompts=2)
    code, said = paired(capsys, ranking, "--lower-is-better", "--resolution", 32, output=tmp_path / "pairs")
    assert code == 0, said

    made, make = [], build.build
    monkeypatch.setattr(build, "build", lambda *words: made.append(make(*words)) or made[-1])
    base, out = world("sdxl"), tmp_path / "my-lora"
    words = ("--model", base, "--data", tmp_path / "pairs", "--validation-fraction", 0, "--output", out)
    ended = command(capsys, *words, *LORA, *SMALL, "--batch-size", 2, "--steps", 3, "--no-samples", "--no-judge")
    assert ended.code == 0 and ended.errors == [], ended
    assert any("10 rows: 10 pairs" in line for line in ended.log), "five pairs of each prompt's four images"
    with torch.no_grad():
        trained = predict(made[0].model.denoiser.eval(), None)
        plain = predict(diffusers.UNet2DConditionModel.from_pretrained(base, subfolder="unet").eval(), None)
    assert (trained - plain).abs().max() > 1e-2
    check = partial(torch.testing.assert_close, expected=trained, rtol=1e-5, atol=1e-5)
    check(by_diffusers(base, out / ADAPTER_FILE, caplog))

    for program in ("comfyui", "a1111"):
        file = tmp_path / f"{program}.safetensors"
        code, said = quietly(export.main, capsys, out, "--to", program, "--output", file)
        assert code == 0, said
        assert set(load_file(file)) == published_names(Path(base)), program
        check(by_diffusers(base, file, caplog))
