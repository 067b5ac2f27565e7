"""dpo.models.lora: keyed initial weights, exact switching, and files that diffusers loads with the same output."""

import copy
import json
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dpo.common.errors import UserError
from dpo.models import lora
from dpo.models.denoiser import halve
from dpo.models.dropout import masks_of
from dpo.models.family import Model
from dpo.models.load import family_of, load, read_index
from dpo.models.parts import hollow
from dpo.models.save import save_lora
from dpo.models.sdxl import kohya_name
from dpo.pages.folder import ADAPTER_FILE
from dpo.planning.sketch import CONFIGS
from tests.dpo.models.test_denoiser import arguments, run
from tests.help.ldm import led_back
from tests.help.operations import Operations
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


@pytest.mark.long
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


CONVOLUTIONS = ("conv1", "conv2", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv", "conv_in", "conv_out")
EVERYTHING = (*TARGETS, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "time_emb_proj", "linear_1", *CONVOLUTIONS)


@pytest.mark.long
@pytest.mark.parametrize("targets", [TARGETS, EVERYTHING], ids=["attention", "everything"])
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
    pipe.load_lora_weights(tmp_path / "out", weight_name=ADAPTER_FILE)
    pipe.unet.eval()
    loaded, trained, plain = run(pipe.unet, None), run(unet, None), run(model.denoiser, None)
    assert (trained - plain).abs().max() > 1e-2
    torch.testing.assert_close(loaded, trained, rtol=1e-5, atol=1e-5)  # alpha / rank = 1.5 included
    (config,) = pipe.unet.peft_config.values()
    assert config.r == 4 and config.lora_alpha == (6 if layout == "kohya" else 4)  # else the scale is in the factors


def added(path: Path) -> dict[str, torch.Tensor]:
    """What a file adds to each layer, as readers see it that look at tensors alone: alpha is the rank where none is."""
    stored = load_file(path)
    found = {}
    for down, up in (("lora_down", "lora_up"), ("lora_A", "lora_B")):
        for stem in [name.removesuffix(f".{down}.weight") for name in stored if name.endswith(f".{down}.weight")]:
            factors = stored[f"{stem}.{down}.weight"], stored[f"{stem}.{up}.weight"]
            alpha = stored.get(f"{stem}.alpha", torch.tensor(float(len(factors[0]))))
            product = factors[1].flatten(1) @ factors[0].flatten(1)
            found[stem] = product.view(len(factors[1]), *factors[0].shape[1:]) * alpha / len(factors[0])
    return found


@pytest.mark.parametrize("layout", ["diffusers", "kohya"])
@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_readers_that_know_only_tensors_see_the_scale(models, tmp_path, kind, layout):
    unet, layers = adapted(models[kind], alpha=6.0)
    train(unet)
    save_lora(models[kind], unet, tmp_path, layout=layout)
    found = added(tmp_path / "pytorch_lora_weights.safetensors")
    own = {name: module for name, module in unet.named_modules() if module in layers}
    name_of = models[kind].family.kohya_name
    stems = {
        name: f"unet.{name}" if layout == "diffusers" else f"lora_unet_{name_of(name, unet).replace('.', '_')}"
        for name in own
    }
    assert found.keys() == set(stems.values())
    for name, module in own.items():
        torch.testing.assert_close(found[stems[name]], module.get_delta_weight("default"))


def test_kohya_names_of_sd_are_those_of_diffusers(models, tmp_path):
    unet, layers = adapted(models["sd15"])
    save_lora(models["sd15"], unet, tmp_path, layout="kohya")
    stored = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert len(stored) == 3 * len(layers) and stored[f"{stem}.alpha"].item() == 6.0
    assert {f"{stem}.lora_down.weight", f"{stem}.lora_up.weight"} <= stored.keys()


@pytest.fixture(scope="module")
def full_sdxl() -> diffusers.UNet2DConditionModel:
    """The UNet of SDXL base as published, without its weights."""
    with torch.device("meta"):
        return diffusers.UNet2DConditionModel(
            sample_size=128,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            block_out_channels=(320, 640, 1280),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )


def test_kohya_names_of_sdxl_are_those_of_sd_scripts(full_sdxl):
    """sd-scripts trains SDXL's own UNet, and gives 722 of its layers a LoRA: the linear ones of its transformers.

    These stand at input_blocks 4, 5 (2 blocks each), 7, 8 (10), middle_block 1 (10), output_blocks 0 to 2 (10) and 3
    to 5 (2), always as the second module.
    """
    blocks = {"input_blocks_4_1": 2, "input_blocks_5_1": 2, "input_blocks_7_1": 10, "input_blocks_8_1": 10}
    blocks |= {"middle_block_1": 10} | {f"output_blocks_{i}_1": 10 if i < 3 else 2 for i in range(6)}
    inner = [f"attn{i}_to_{part}" for i in (1, 2) for part in ("q", "k", "v", "out_0")] + ["ff_net_0_proj", "ff_net_2"]
    wanted = {f"lora_unet_{block}_proj_{side}" for block in blocks for side in ("in", "out")}
    for block, depth in blocks.items():
        wanted |= {f"lora_unet_{block}_transformer_blocks_{i}_{part}" for i in range(depth) for part in inner}
    assert len(wanted) == 722
    linear = (torch.nn.Linear, torch.nn.Conv2d)
    layers = {n for n, m in full_sdxl.named_modules() if isinstance(m, linear) and ".attentions." in n}
    names = {name: f"lora_unet_{kohya_name(name, full_sdxl).replace('.', '_')}" for name in layers}
    assert set(names.values()) == wanted


def test_kohya_names_of_every_layer_of_sdxl_are_the_original_ones(full_sdxl):
    """diffusers' map from original checkpoints takes each of them back to the layer."""
    linear = (torch.nn.Linear, torch.nn.Conv2d)
    layers = [name for name, module in full_sdxl.named_modules() if isinstance(module, linear)]
    original = [kohya_name(name, full_sdxl) for name in layers]
    assert len(set(original)) == len(layers) == 794
    assert led_back(original, full_sdxl.config) == dict(zip(original, layers, strict=True))
    known = {
        "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks.4.1.transformer_blocks.0.attn1.to_q"
    }
    known |= {"mid_block.resnets.1.conv2": "middle_block.2.out_layers.3", "conv_out": "out.2"}
    known |= {
        "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
        "up_blocks.0.upsamplers.0.conv": "output_blocks.2.2.conv",
    }
    assert {name: kohya_name(name, full_sdxl) for name in known} == known


WIDTH = 3072  # of FLUX.1, klein-4B and Qwen-Image
JOINT = "to_q to_k to_v to_out.0 add_q_proj add_k_proj add_v_proj to_add_out"


def square(names: str, width: int = WIDTH, inside: str = "attn.") -> dict[str, tuple[int, int]]:
    return {f"{inside}{name}": (width, width) for name in names.split()}


# What public LoRA files of the published models hold, those of diffusers' own training scripts: for each list of blocks
# how many there are, and their adapted layers with the widths that these take and give. Qwen-Image: as DiffSynth's and
# others' files, without the modulation.
PUBLIC = {
    "sd35-medium": {"transformer_blocks": (24, square(JOINT, 1536))},
    "flux-dev": {
        "transformer_blocks": (
            19,
            square(JOINT)
            | {f"{ff}.net.0.proj": (WIDTH, 4 * WIDTH) for ff in ("ff", "ff_context")}
            | {f"{ff}.net.2": (4 * WIDTH, WIDTH) for ff in ("ff", "ff_context")},
        ),
        "single_transformer_blocks": (38, square("to_q to_k to_v")),
    },
    "flux2-klein-base-4b": {
        "transformer_blocks": (5, square("to_q to_k to_v to_out.0")),
        "single_transformer_blocks": (
            20,  # q, k, v and the two halves of a gated MLP of three widths; attention and MLP
            {"attn.to_qkv_mlp_proj": (WIDTH, 9 * WIDTH), "attn.to_out": (4 * WIDTH, WIDTH)},
        ),
    },
    "qwen-image": {
        "transformer_blocks": (60, square(JOINT) | {f"{x}_mlp.net.2": (4 * WIDTH, WIDTH) for x in ("img", "txt")})
    },
}
NONE_THERE = {"sd35-medium": {"transformer_blocks.23.attn.to_add_out"}}  # its last block gives no text


@pytest.mark.long
@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * (x == "qwen-image")) for x in PUBLIC])
def test_a_file_of_a_published_flow_model_has_the_keys_and_shapes_of_public_ones(tmp_path, name, caplog):
    folder, rank = CONFIGS / name, 4
    family = family_of(read_index(folder), "auto")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    transformer = hollow(getattr(diffusers, family.denoiser_class), config)
    with caplog.at_level("WARNING", "dpo"):
        lora.add(transformer, rank=rank, alpha=rank, target_modules=family.lora_targets, dropout=0.0, seed=0)
    assert not caplog.records, "no target and no kind of block is left out"
    for module in lora.adapter_layers(transformer):
        for part in (module.lora_A, module.lora_B):
            part.to_empty(device="cpu")
    lora.save(transformer, family, tmp_path)
    layers = {
        f"{blocks}.{i}.{layer}": widths
        for blocks, (count, inside) in PUBLIC[name].items()
        for i in range(count)
        for layer, widths in inside.items()
        if f"{blocks}.{i}.{layer}" not in NONE_THERE.get(name, ())
    }
    expected = {f"transformer.{layer}.lora_A.weight": [rank, taken] for layer, (taken, _) in layers.items()}
    expected |= {f"transformer.{layer}.lora_B.weight": [given, rank] for layer, (_, given) in layers.items()}
    with safe_open(tmp_path / ADAPTER_FILE, "pt") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == expected  # noqa: SIM118  # no mapping


def test_metadata_is_readable_without_peft(models, tmp_path):
    unet, _ = adapted(models["sd15"])
    save_lora(models["sd15"], unet, tmp_path, layout="diffusers")
    raw = (tmp_path / "pytorch_lora_weights.safetensors").read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    text = json.dumps(header["__metadata__"])
    assert "lora_alpha" in text and str(Path.home()) not in text


def test_what_was_trained_with_dropout_draws_without(models, tmp_path, pipelines):
    """diffusers puts the adapter's modules into training mode when it loads one."""
    unet = copy.deepcopy(models["sd15"].denoiser)
    lora.add(unet, rank=4, alpha=4, target_modules=TARGETS, dropout=0.5, seed=0)
    save_lora(models["sd15"], unet, tmp_path, layout="diffusers")
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(pipelines["sd15"])
    pipe.load_lora_weights(tmp_path, weight_name=ADAPTER_FILE)
    dropouts = [module for module in pipe.unet.modules() if isinstance(module, torch.nn.Dropout)]
    assert all(module.p == 0 for module in dropouts)
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", "pt") as file:
        told = json.loads(file.metadata()["lora_adapter_metadata"])
    assert told["unet.lora_dropout"] == 0.0 and told["unet.target_modules"] == sorted(TARGETS)


def test_dropout_is_keyed_and_each_layer_has_its_own(models):
    unet = copy.deepcopy(models["sd15"].denoiser)
    layers = lora.add(unet, rank=4, alpha=4, target_modules=TARGETS, dropout=0.5, seed=0)
    inside = [layer.lora_dropout["default"] for layer in layers]
    assert [module.layer for module in inside] == list(range(len(layers))) and not any(
        isinstance(module, torch.nn.Dropout) for layer in layers for module in layer.modules()
    )
    assert {id(module.masks) for module in inside} == {id(masks_of(layers))}
    assert masks_of(adapted(models["sd15"])[1]) is None, "without dropout there is nothing to set"


CASES = [
    ("fp32", None, 4.0),
    ("fp32", None, 6.0),
    ("fp32", torch.bfloat16, 4.0),
    ("fp64", None, 4.0),
    ("bf16", None, 4.0),
]


@pytest.mark.long
@pytest.mark.parametrize(("precision", "autocast", "alpha"), CASES)
@pytest.mark.parametrize("dropout", [0.0, 0.25])
def test_the_short_forward_has_the_bits_of_pefts_own(models, precision, autocast, alpha, dropout):
    """Prediction and the adapter's gradients; under autocast, in float64, and where only the base is bf16."""
    unet = copy.deepcopy(models["sdxl"].denoiser)
    dtype = {"fp64": torch.float64, "bf16": torch.bfloat16}.get(precision, torch.float32)
    unet.to(dtype)
    layers = lora.add(unet, rank=4, alpha=alpha, target_modules=(*TARGETS, "conv1"), dropout=dropout, seed=0)
    if autocast is not None:
        halve(unet, autocast)
    train(unet)
    assert {type(layer).__name__ for layer in layers} == {"Linear", "Conv2d"}
    if dropout:
        masks_of(layers).set(torch.tensor([3, 4]), torch.tensor([0, 1]), torch.tensor(7))
    args, kwargs = arguments(unet, dtype)

    def outcome():
        with Operations() as counted:
            with torch.autocast("cpu", dtype=autocast, enabled=autocast is not None):
                out = unet(*args, **kwargs)[0]
            out.double().square().sum().backward()
        trained = [p for p in unet.parameters() if p.requires_grad]
        found = [out.detach(), *(p.grad.clone() for p in trained)]
        unet.zero_grad()
        return found, counted.found

    short, few = outcome()
    for layer in layers:
        del layer.forward  # peft's own is the class's
    plain, many = outcome()
    assert all(torch.equal(a, b) for a, b in zip(short, plain, strict=True)) and len(short) == 2 * len(layers) + 1
    casts, products = (many[name] - few[name] for name in ("aten._to_copy.default", "aten.mul.Tensor"))
    assert casts >= (2 * len(layers) if autocast else 0), "forward and backward"
    assert products >= (2 * len(layers) if alpha == 4.0 else 0)
