"""dpo.training.deterministic: what is asked of torch, and that a whole run has an operation for everything it does then."""

import os

import pytest
import torch

from dpo.common.errors import UserError
from dpo.settings.flags import parse
from dpo.training.deterministic import VARIABLE, make_deterministic
from tests.help.running import advance, everything, make_run


@pytest.fixture
def as_before(monkeypatch):
    monkeypatch.setenv(VARIABLE, os.environ.get(VARIABLE, ""))
    monkeypatch.delenv(VARIABLE)
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark, cuda.mem_efficient_sdp_enabled(), cuda.cudnn_sdp_enabled()
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True
    cudnn.deterministic, cudnn.benchmark = flags[:2]
    cuda.enable_mem_efficient_sdp(flags[2])
    cuda.enable_cudnn_sdp(flags[3])


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [["--method", "dde", "--lora"], ["--method", "dpo", "--optimizer", "adamw8bit"]], ids=["lora", "full"]
)
def test_a_run_has_a_deterministic_operation_for_everything(world, tmp_path, as_before, flags):
    """On a CPU the bits are the same with and without it; that they repeat on a GPU is shown by a GPU alone."""
    ran = {}
    for name, more in (("free", []), ("bound", ["--deterministic"])):
        run = make_run(world("sd15"), world("pairs"), tmp_path / name, "--batch-size", "2", *flags, *more)
        assert torch.are_deterministic_algorithms_enabled() == bool(more)
        advance(run, 2)
        ran[name] = everything(run)
    assert ran["free"].keys() == ran["bound"].keys()
    assert all(torch.equal(ran["free"][name], ran["bound"][name]) for name in ran["free"])
    assert os.environ[VARIABLE] == ":4096:8" and torch.backends.cudnn.deterministic
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.math_sdp_enabled()
    assert not torch.backends.cuda.mem_efficient_sdp_enabled() and not torch.backends.cuda.cudnn_sdp_enabled()


def test_what_rules_it_out_is_refused(monkeypatch, as_before):
    with pytest.raises(UserError, match="--attention sdpa"):
        parse(["--model", "m", "--data", "d", "--deterministic", "--attention", "xformers"])
    monkeypatch.setenv(VARIABLE, ":0:0")
    with pytest.raises(UserError, match="CUBLAS_WORKSPACE_CONFIG=:4096:8 or :16:8, and the environment has :0:0"):
        make_deterministic()
    assert not torch.are_deterministic_algorithms_enabled()
