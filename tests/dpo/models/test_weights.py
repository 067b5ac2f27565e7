"""dpo.models.weights: a UNet's weights from a file of any layout are the diffusers folder's, or the file is refused."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from dpo.common.errors import UserError
from dpo.models.load import load, load_weights_into
from tests.help.ldm import weights_of, write_single_file
from tests.help.worlds import make_pipeline

ORIGINAL = "model.diffusion_model."


def renamed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value.clone() for name, value in state.items()}


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd15", "sd2v", "sdxl"])
def test_a_unet_in_any_layout_and_under_any_prefix(pipelines, tmp_path, kind):
    other = make_pipeline(tmp_path / "other", kind, seed=1)
    wanted, path = weights_of(other / "unet"), tmp_path / "unet.safetensors"
    whole = load_file(write_single_file(other, path))
    original = {name.removeprefix(ORIGINAL): value for name, value in whole.items() if name.startswith(ORIGINAL)}
    files = {
        "a whole checkpoint": whole,
        "a whole checkpoint of averaged weights too": whole | renamed(original, "model_ema."),
        "the UNet of one": renamed(original, ORIGINAL),
        "without its prefix": original,
        "with marks of its target": wanted | {"v_pred": torch.empty(0), "ztsnr": torch.empty(0)},
        "as ComfyUI stores it": renamed(original, "diffusion_model."),
        "the state of a compiled module": renamed(wanted, "_orig_mod."),
        "of one under DistributedDataParallel": renamed(wanted, "module."),
        "of both": renamed(wanted, "module._orig_mod."),
        "of both, the other way round": renamed(original, "_orig_mod.module."),
        "of a compiled block": {
            name.replace("mid_block.", "mid_block._orig_mod."): value for name, value in wanted.items()
        },
        "of a compiled one in a checkpoint": renamed(original, ORIGINAL + "_orig_mod."),
    }
    unet = load(str(pipelines[kind])).denoiser
    assert not torch.equal(unet.conv_in.weight, wanted["conv_in.weight"])
    own = {name: value.clone() for name, value in unet.state_dict().items()}
    for layout, state in files.items():
        unet.load_state_dict(own)
        save_file(state, path)
        load_weights_into(unet, str(path))
        found = unet.state_dict()
        assert all(torch.equal(value, wanted[name]) for name, value in found.items()), layout


def test_files_that_are_refused_leave_the_unet_as_it_was(pipelines, tmp_path):
    unet = load(str(pipelines["sd15"])).denoiser
    before = {name: value.clone() for name, value in unet.state_dict().items()}
    whole = load_file(write_single_file(pipelines["sd15"], tmp_path / "whole.safetensors"))
    original = {name.removeprefix(ORIGINAL): value for name, value in whole.items() if name.startswith(ORIGINAL)}
    missing = {name: value for name, value in original.items() if name != "input_blocks.1.0.in_layers.2.weight"}
    files = {
        "another architecture.*down_blocks.0.resnets.0.conv1.weight": missing,
        "another architecture": load_file(write_single_file(pipelines["sdxl"], tmp_path / "xl.safetensors")),
        "first mismatch: conv_in.weight": {"a": torch.zeros(1)},
        "as torch.int8": {name: value.to(torch.int8) for name, value in before.items()},
        "the model's UNet": weights_of(pipelines["sd15"] / "vae"),
    }
    for message, state in files.items():
        save_file(state, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=message) as caught:
            load_weights_into(unet, str(tmp_path / "bad.safetensors"))
        assert "\n" not in str(caught.value) and "--unet-init" in str(caught.value)
    pickled = tmp_path / "unet.pt"
    torch.save(before, pickled)
    with pytest.raises(UserError, match=r"unet.pt is not a .safetensors file; convert"):
        load_weights_into(unet, str(pickled))
    assert all(torch.equal(value, before[name]) for name, value in unet.state_dict().items())
