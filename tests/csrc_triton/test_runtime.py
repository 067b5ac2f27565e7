"""Where kernels run: every launch of every op happens while the device of its tensors is the current one."""

import importlib
import pkgutil
from contextlib import contextmanager

import pytest
import torch

import csrc_triton
from csrc_triton import adamw8bit, geglu, group_norm_silu, layer_norm, noising, pair_errors, runtime, timesteps

MODULES = (geglu, noising, layer_norm, group_norm_silu, pair_errors, timesteps, adamw8bit)


class Kernel:
    """In place of a kernel: notes at each launch the device that was current."""

    def __init__(self, name, launched, current):
        self.name, self.launched, self.current = name, launched, current

    def __getitem__(self, grid):
        return self

    def __call__(self, *args, **options):
        self.launched.setdefault(self.name, []).append(self.current[-1] if self.current else None)


@pytest.fixture
def launched(monkeypatch):
    """Devices that were current, by kernel; filled as kernels are launched, which compute nothing."""
    found, current = {}, []

    @contextmanager
    def device_of(x):
        current.append(x.device)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for module in MODULES:
        monkeypatch.setattr(module, "runs_triton", lambda x: True, raising=False)
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, Kernel(name, found, current))
    return found


def every_launcher() -> None:
    """Those that other launchers call too are called by themselves: gradient release does so."""
    B, C = 2, 8
    keys = draws = t = torch.zeros(B, dtype=torch.int64)
    table, images = torch.ones(4), torch.randn(2 * B, C, 4, 4, requires_grad=True)
    weight, bias = torch.ones(C, requires_grad=True), torch.zeros(C, requires_grad=True)
    rows = torch.randn(6, C, requires_grad=True)
    geglu.geglu(rows).sum().backward()
    timesteps.draw_timesteps(torch.arange(5), keys, draws, 0)
    noising.noise_pairs(images.detach(), t, table, table, keys, draws, 0)
    noising.sample_posterior(images.detach(), images.detach(), keys, draws, 0, 1.0)
    ones = torch.ones(B)
    pair_errors.pair_errors(images, t, ones, ones, table, table, 1.0, target=images.detach()).logit.sum().backward()
    layer_norm.layer_norm(rows, weight, bias, 1e-5).sum().backward()
    layer_norm.sum_partials(torch.zeros(3, 2, C), bias)
    temb = torch.randn(2 * B, C, requires_grad=True)
    group_norm_silu.group_norm_silu(images, weight, bias, 2, 1e-5, temb).sum().backward()
    large, small = torch.zeros(8192, requires_grad=True), torch.zeros(16, requires_grad=True)
    large.grad, small.grad = torch.zeros_like(large), torch.zeros_like(small)
    one = torch.ones(1)
    optimizer = adamw8bit.AdamW8bit([large, small])
    optimizer._refresh_hyper()
    optimizer._launch_step(one, one, one)
    optimizer._launch_begin(one)
    for key in range(2):
        optimizer._launch_one(key, one, one, one)


def test_every_kernel_is_launched_on_the_device_of_its_tensors(launched):
    every_launcher()
    kernels = {name for module in MODULES for name in vars(module) if name.endswith("_kernel")}
    assert launched.keys() == kernels and len(kernels) >= 15
    assert {name for name, devices in launched.items() if set(devices) != {torch.device("cpu")}} == set()


def test_every_module_with_a_kernel_of_its_own_is_looked_at():
    """Kernels that others inline (philox, elementary) are launched by nobody."""
    names = (module.name for module in pkgutil.iter_modules(csrc_triton.__path__))
    modules = [importlib.import_module(f"csrc_triton.{name}") for name in names]
    launching = {module for module in modules if any(name.startswith("_launch") for name in vars(module))}
    launching |= {
        module
        for module in modules
        if any(
            name.startswith("_launch")
            for kind in vars(module).values()
            if isinstance(kind, type) and kind.__module__ == module.__name__
            for name in vars(kind)
        )
    }
    assert launching == set(MODULES)


def test_the_first_tensor_says_which_device(monkeypatch):
    seen = []

    @contextmanager
    def device_of(x):
        seen.append(x)
        yield

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    x = torch.zeros(2)
    assert runtime.on_its_device(lambda kind, a, b: (kind, b))(None, x, 3) == (None, 3)
    assert seen[0] is x


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_second_gpu_computes_what_the_first_does():
    x = torch.randn(6, 64)
    first, second = (geglu.geglu(x.to(f"cuda:{index}")).cpu() for index in range(2))
    assert torch.equal(first, second)
