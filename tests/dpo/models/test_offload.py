"""dpo.models.offload: gradients bit for bit, what moves and what stays, and no copy read before it is finished."""

import weakref
from types import SimpleNamespace

import pytest
import torch
from diffusers import UNet2DConditionModel

from dpo.models.denoiser import use_checkpointing
from dpo.models.offload import LEAST, LEAVING, Moved, Offload, on_host, use_offload
from dpo.models.ready import settle
from dpo.settings.config import Runtime
from tests.dpo.models.test_denoiser import run
from tests.help.worlds import make_pipeline

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_pipeline(tmp_path_factory.mktemp("sdxl") / "m", "sdxl") / "unet"


@pytest.fixture
def unet(folder):
    return UNet2DConditionModel.from_pretrained(folder, use_safetensors=True).eval().requires_grad_(True)


class Late(Offload):
    """Copies that take place only when something waits for them, on a target full of nan until then."""

    made: list = []  # noqa: RUF012 - all of them, for the tests to look at

    def __init__(self, *args, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.pending: list = []
        self.late = 0
        Late.made.append(self)

    def _copy(self, target, source):
        target.fill_(float("nan"))
        event = SimpleNamespace()
        self.pending.append((event, weakref.ref(target), weakref.ref(source)))
        return event

    def _wait(self, event):
        while any(waiting is event for waiting, *_ in self.pending):
            _, target, source = self.pending.pop(0)
            assert source() is not None, "its memory was given away before the copy"
            target().copy_(source())
            self.late += 1


def gradients(unet, checkpointing):
    use_checkpointing(unet, checkpointing)
    run(unet, None).square().mean().backward()
    found = {name: p.grad for name, p in unet.named_parameters() if p.grad is not None}
    unet.zero_grad()
    return found


@pytest.mark.parametrize("checkpointing", ["off", "on"])
@pytest.mark.parametrize("how", [Offload, Late])
def test_gradients_are_the_same_bit_for_bit(unet, monkeypatch, how, checkpointing):
    monkeypatch.setattr("dpo.models.offload.Offload", how)
    expected = gradients(unet, checkpointing)
    use_offload(unet, CPU, least=2048)
    Late.made.clear()
    found = gradients(unet, checkpointing)
    assert found.keys() == expected.keys() and len(found) > 100
    assert [name for name in expected if not torch.equal(found[name], expected[name])] == []
    if how is Late:
        (made,) = Late.made
        back = sum(moved.used for moved in made.moved)
        assert back > 10 and made.late >= len(made.moved) + back - 1 and len(made.pending) <= 1


def test_with_checkpointing_the_inputs_of_blocks_are_moved(unet, monkeypatch):
    """Nothing of the size of an activation stays on the device but what the hooks do not see."""
    monkeypatch.setattr("dpo.models.offload.Offload", Late)
    counts = {}
    for checkpointing in ("off", "on"):
        use_offload(unet, CPU, least=2048)
        Late.made.clear()
        gradients(unet, checkpointing)
        counts[checkpointing] = sum(moved.host.numel() for made in Late.made[:1] for moved in made.moved)
        del unet.forward
    assert 0 < counts["on"] < 0.5 * counts["off"]


LAYER = torch.nn.Linear(2, 2)


def packed(x, denoiser=LAYER, least=1):
    made = Offload(denoiser, CPU, torch.cpu.Stream(), least)
    return made, made._pack(x)


def test_what_stays():
    layer = torch.nn.Linear(8, 8)
    for stays in (layer.weight, layer.weight.detach(), layer.weight.t(), torch.ones(4, 4)[:, :2], torch.ones(4, 4).t()):
        made, found = packed(stays, layer)
        assert found is stays and not made.moved
    small, large = torch.ones(LEAST // 4 - 1), torch.ones(LEAST // 4)
    assert packed(small, least=LEAST)[1] is small and isinstance(packed(large, least=LEAST)[1], Moved)


def test_a_device_is_the_same_with_its_number_and_without():
    """A run's device is "cuda", and that of its tensors "cuda:0"."""
    made = Offload(LAYER, torch.device("cpu:0"), torch.cpu.Stream(), 1)
    assert isinstance(made._pack(torch.ones(4)), Moved)
    assert made._pack(meta := torch.ones(4, device="meta")) is meta


def test_the_layout_is_kept():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    made, moved = packed(x)
    back = made._unpack(moved)
    assert (
        back.stride() == x.stride() == on_host(x).stride() and torch.equal(back, x) and back.data_ptr() != x.data_ptr()
    )
    assert torch.equal(made._unpack(moved), x), "a graph that is kept asks twice"


def test_few_sources_wait_for_their_copies():
    made = Late(LAYER, CPU, torch.cpu.Stream(), 1)
    with made:
        for _ in range(5):
            made._pack(torch.ones(4))
            assert len(made.leaving) <= LEAVING
    assert not made.leaving and not made.pending


def test_a_run_asks_for_it(unet):
    settle(Runtime(channels_last="off", kernels="torch"), unet, CPU)
    assert "forward" not in vars(unet)
    settle(Runtime(channels_last="off", kernels="torch", activation_offload=True), unet, CPU)
    assert "forward" in vars(unet)


def test_nothing_is_moved_where_nothing_is_differentiated(unet, monkeypatch):
    monkeypatch.setattr("dpo.models.offload.Offload", lambda *_: pytest.fail("moved"))
    use_offload(unet, CPU, least=1)
    with torch.no_grad():
        run(unet, None)
