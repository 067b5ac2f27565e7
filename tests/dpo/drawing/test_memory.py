"""dpo.drawing.memory: what drawing takes, against a count of every tensor; and memory that is elsewhere meanwhile."""

import contextlib
import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dpo.drawing import memory
from dpo.training import checkpoint, optimizer

CPU = torch.device("cpu")


class Living(TorchDispatchMode):
    """Bytes of the tensors made inside the block that are alive, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor) and id(leaf.untyped_storage()) not in given:
                size = leaf.untyped_storage().nbytes()
                self.now += size
                self.most = max(self.most, self.now)
                weakref.finalize(leaf.untyped_storage(), self.gone, size)
        return result

    def gone(self, size):
        self.now -= size


@torch.no_grad()
def most(work) -> int:
    with Living() as living:
        work()
    return living.most


@pytest.mark.long
def test_what_drawing_takes_covers_what_is_counted_for_stable_diffusion(monkeypatch):
    """Its real shapes, without memory behind them; attention as on a GPU, without the matrix of all positions."""
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280))
        widths = (128, 256, 512, 512)
        downs, ups = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        vae = AutoencoderKL(block_out_channels=widths, down_block_types=downs, up_block_types=ups, layers_per_block=2)
        x, states = torch.empty(2, 4, 64, 64), torch.empty(2, 77, 768)
        decoded, denoised = most(lambda: vae.decode(x[:1])), most(lambda: unet(x, torch.empty(2), states))
    pipe = SimpleNamespace(components={"unet": unet.requires_grad_(False)}, vae=vae, vae_scale_factor=8)
    meta = torch.device("meta")  # where the weights are: none is brought
    need = [memory.needed(pipe, meta, batch, None) for batch in (1, 4)]
    assert 1.2 * max(decoded, denoised) < need[0] < 2 * max(decoded, denoised) and need[1] == 4 * need[0]
    monkeypatch.setattr(memory, "DECODED", 0.0)
    assert 1.2 * denoised < memory.needed(pipe, meta, 1, None) < 2 * denoised


SD = {"sample_size": 64, "cross_attention_dim": 768, "block_out_channels": (320, 640, 1280, 1280)}
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20), "use_linear_projection": True,
}  # fmt: skip


HALF, WIDE = (torch.float16, torch.float16), (torch.float32, torch.float16)  # of VAE and UNet
FULL = (torch.float32, torch.float32)


@pytest.mark.long
@pytest.mark.parametrize(
    ("config", "size", "dtypes", "guided"),
    [
        (SD, (512, 512), HALF, True),
        pytest.param(SDXL, (1024, 1024), WIDE, True, marks=pytest.mark.slow),
        (SDXL, (512, 512), WIDE, False),
        pytest.param(SD, (512, 768), FULL, False, marks=pytest.mark.slow),
        pytest.param(SDXL, (1536, 640), WIDE, False, marks=pytest.mark.slow),
        pytest.param(SDXL, (1024, 1024), FULL, True, marks=pytest.mark.slow),
    ],
    ids=["sd15", "sdxl", "turbo", "sd15 tall fp32", "sdxl wide", "sdxl fp32"],
)
def test_the_vae_on_one_image_takes_no_more_than_the_unet_takes_for_a_group(monkeypatch, config, size, dtypes, guided):
    """Real shapes, without memory behind them, in the precisions of a GPU; its encoder too, for SDEdit."""
    monkeypatch.setattr(functional, "scaled_dot_product_attention", lambda q, *_, **__: torch.empty_like(q))
    with torch.device("meta"):
        unet = UNet2DConditionModel(**config).to(dtypes[1])
        downs, ups = ("DownEncoderBlock2D",) * 4, ("UpDecoderBlock2D",) * 4
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=downs, up_block_types=ups, layers_per_block=2
        ).to(dtypes[0])
        pipe = SimpleNamespace(components={"unet": unet}, vae=vae, vae_scale_factor=8)
        group = memory.group_for(pipe, torch.device("cuda"), *size, guided)
        seen, (width, height) = group * (1 + guided), size
        x, t = torch.empty(seen, 4, height // 8, width // 8, dtype=dtypes[1]), torch.empty(seen)
        states = torch.empty(seen, 77, config["cross_attention_dim"], dtype=dtypes[1])
        pixels = torch.empty(1, 3, height, width, dtype=dtypes[0])
        decoded, denoised = most(lambda: vae.decode(x[:1].to(dtypes[0]))), most(lambda: unet(x, t, states))
        encoded = most(lambda: vae.encode(pixels))
    print(f"group {group}: decoder {decoded >> 20}, encoder {encoded >> 20}, UNet {denoised >> 20} MiB")
    assert max(decoded, encoded) <= denoised
    assert group == 4 or denoised < 4 * decoded  # and no more than that takes
    assert memory.group_for(pipe, CPU, *size, guided) == 4


def test_modules_that_must_be_brought_and_casts_that_autocast_keeps_count():
    layer = torch.nn.Linear(1000, 1000, bias=False)
    config = {"sample_size": 1, "block_out_channels": (1,)}
    layer.config = config
    vae = SimpleNamespace(config=config, dtype=torch.float32)
    pipe = SimpleNamespace(components={"unet": layer, "other": 3}, vae=vae, vae_scale_factor=1)
    plain = memory.needed(pipe, CPU, 1, None)
    assert memory.needed(pipe, torch.device("meta"), 1, None) == plain + 4_000_000
    assert memory.needed(pipe, CPU, 1, torch.bfloat16) == plain + 2_000_000
    layer.requires_grad_(False)
    assert memory.needed(pipe, CPU, 1, torch.bfloat16) == plain


def test_a_cpu_is_never_asked():
    assert memory.free(CPU) is None


@pytest.mark.parametrize("failing", [False, True])
def test_what_is_set_aside_has_no_memory_and_comes_back(failing):
    one, other = torch.arange(12.0), torch.arange(6, dtype=torch.uint8)
    view = one[3:].view(3, 3)
    paged = torch.ones(4)
    paged.is_paged = True
    values = one.clone(), other.clone()
    with contextlib.suppress(ZeroDivisionError), memory.aside([one, view, other, paged, torch.empty(0)]):
        assert one.untyped_storage().nbytes() == other.untyped_storage().nbytes() == 0
        assert paged.untyped_storage().nbytes() == 16
        1 / (not failing)
    assert torch.equal(one, values[0]) and torch.equal(other, values[1]) and torch.equal(view, one[3:].view(3, 3))


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit", "adafactor"])
def test_an_optimizer_goes_on_as_if_nothing_had_been(kind):
    ends = []
    for away in (False, True):
        weight = torch.nn.Parameter(torch.linspace(-1, 1, 5000).view(50, 100))
        made = optimizer.build(kind, [weight], lr=1e-2, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.1)
        for update in range(3):
            weight.grad = torch.cos(weight.detach() * (update + 1))
            made.step()
            states = checkpoint.pack(made.state_dict())[0].values()
            with memory.aside(states) if away else contextlib.nullcontext():
                assert not away or not any(s.untyped_storage().nbytes() for s in states)
        ends.append(weight.detach())
    assert torch.equal(*ends)
