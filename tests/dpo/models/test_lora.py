"""dpo.models.lora: keyed initial weights, exact switching, and files that diffusers loads with the same output."""

import copy
import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file

from dpo.common.errors import UserError
from dpo.models import lora
from dpo.models.dropout import masks_of
from dpo.models.family import Model
from dpo.models.load import load
from dpo.models.save import save_lora
from tests.dpo.models.test_denoiser import run
from tests.help.worlds import make_pipeline

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, Model]:
    root = tmp_path_factory.mktemp("models")
    return {kind: load(str(make_pipeline(root / kind, kind))) for kind in ("sd15", "sd2v", "sdxl")}


def adapted(model: Model, *, rank: int = 4, alpha: float = 6.0, targets: tuple[str, ...] = TARGETS, seed: int = 0):
    unet = copy.deepcopy(model.denoiser)
    return unet, lora.add(unet, rank=rank, alpha=alpha, target_modules=targets, dropout=0.0, seed=seed)


def train(unet: torch.nn.Module) -> None:
    """As if trained: no factor is zero any more."""
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in unet.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def test_initial_weights_are_a_function_of_the_seed(models):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    one, _ = adapted(models["sd15"], seed=3)
    assert torch.equal(torch.random.get_rng_state(), state)  # the global generator is left as it was
    torch.manual_seed(2)
    two, other = adapted(models["sd15"], seed=3)[0], adapted(models["sd15"], seed=4)[0]
    a, b, c = lora.state(one), lora.state(two), lora.state(other)
    assert a.keys() == b.keys() == c.keys() and all(torch.equal(a[name], b[name]) for name in a)
    for name in a:
        if "lora_A" in name:
            assert a[name].std() > 0 and not torch.equal(a[name], c[name])
        else:
            assert not a[name].any()


def test_only_the_adapter_is_trained(models):
    unet, layers = adapted(models["sdxl"], rank=4)
    trained = {name: p for name, p in unet.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * len(layers) and all("lora_" in name for name in trained)
    assert all(p.dtype == torch.float32 for p in trained.values())
    modules = {name.split(".lora_")[0] for name in trained}
    assert all(name.endswith(TARGETS) for name in modules)
    expected = {name for name, m in models["sdxl"].denoiser.named_modules() if name.endswith(TARGETS)}
    assert modules == expected


def test_switching_off_gives_the_plain_unets_bits(models):
    for model in models.values():
        unet, layers = adapted(model)
        plain = run(model.denoiser, None)
        assert torch.equal(run(unet, None), plain)
        train(unet)
        moved = run(unet, None)
        assert not torch.equal(moved, plain)
        with lora.adapters_off(layers):
            assert torch.equal(run(unet, None), plain)
            assert all(p.requires_grad for name, p in unet.named_parameters() if "lora_" in name)
        assert torch.equal(run(unet, None), moved)


def test_no_matching_layer_is_one_line(models):
    with pytest.raises(UserError, match=r"--target-modules to_nowhere,nor_there matches no layer") as caught:
        adapted(models["sd15"], targets=("to_nowhere", "nor_there"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("targets", [TARGETS, (*TARGETS, "proj_in", "ff.net.2", "conv1")])
@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd15", "sd2v", "sdxl"])
def test_saved_adapter_loads_in_diffusers_with_the_same_output(models, tmp_path, kind, layout, targets):
    model = models[kind]
    unet, _ = adapted(model, targets=targets)
    train(unet)
    save_lora(model, unet, tmp_path / "out", layout=layout)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["pytorch_lora_weights.safetensors"]
    pipe = getattr(diffusers, model.family.pipeline).from_pretrained(model.folder)
    assert not torch.equal(run(pipe.unet, None), run(unet, None))
    pipe.load_lora_weights(tmp_path / "out")
    pipe.unet.eval()
    loaded, trained, plain = run(pipe.unet, None), run(unet, None), run(model.denoiser, None)
    assert (trained - plain).abs().max() > 1e-2
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-6)  # alpha / rank = 1.5 included
    (config,) = pipe.unet.peft_config.values()
    assert config.r == 4 and config.lora_alpha == 6


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_kohya_names(models, tmp_path, kind):
    unet, layers = adapted(models[kind])
    train(unet)
    save_lora(models[kind], unet, tmp_path, layout="kohya")
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    assert len(stored) == 3 * len(layers)
    for name, value in stored.items():
        stem, kind_of = name.split(".", 1)
        assert stem.startswith("lora_unet_") and kind_of in ("lora_down.weight", "lora_up.weight", "alpha")
        assert kind_of != "alpha" or value.item() == 6.0


def test_metadata_is_readable_without_peft(models, tmp_path):
    unet, _ = adapted(models["sd15"])
    save_lora(models["sd15"], unet, tmp_path, layout="diffusers")
    raw = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    text = json.dumps(header["__metadata__"])
    assert "lora_alpha" in text and str(Path.home()) not in text


def test_dropout_is_keyed_and_each_layer_has_its_own(models):
    unet = copy.deepcopy(models["sd15"].denoiser)
    layers = lora.add(unet, rank=4, alpha=4, target_modules=TARGETS, dropout=0.5, seed=0)
    inside = [layer.lora_dropout["default"] for layer in layers]
    assert [module.layer for module in inside] == list(range(len(layers))) and not any(
        isinstance(module, torch.nn.Dropout) for layer in layers for module in layer.modules()
    )
    assert {id(module.masks) for module in inside} == {id(masks_of(layers))}
    assert masks_of(adapted(models["sd15"])[1]) is None, "without dropout there is nothing to set"
