"""Invariant: policy equal to reference gives logits of exactly 0 and losses of exactly ln 2, on every path."""

import math

import pytest
import torch
from diffusers.models.transformers.transformer_2d import Transformer2DModel

from dpo.common.errors import UserError
from dpo.models import ready
from dpo.models.denoiser import fix_projections
from tests.help.flow import SMALL, TRAINED
from tests.help.running import make_run

PATHS = {
    "full": [],
    "lora": ["--lora"],
    "lora with dropout": ["--lora", "--lora-dropout", "0.5"],
    "bf16 autocast": ["--precision", "bf16"],
    "bf16 autocast, lora": ["--precision", "bf16", "--lora"],
    "bf16 weights": ["--precision", "bf16-pure"],
    "checkpointing": ["--checkpointing", "on"],
    "checkpointing one block, bf16": ["--checkpointing", "down_blocks.0", "--precision", "bf16"],
    "channels last": ["--channels-last", "on"],
    "lora with checkpointing": ["--lora", "--checkpointing", "on"],
    "dde": ["--method", "dde"],
    "float64": ["--precision", "fp64"],
}
LOSS = {"hinge": 1.0, "ipo": 0.25, "apo-zero": 1.0, "robust": math.log(2)}


def first_terms(run):
    batches = run.batches()
    terms = run.step(run.encoder.inputs(next(batches)), run.correction())
    batches.close()
    return terms


@pytest.mark.parametrize("flags", PATHS.values(), ids=PATHS)
def test_logits_are_exactly_zero_and_the_gradient_is_not(world, tmp_path, flags):
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "4", *flags)
    terms = first_terms(run)
    assert torch.equal(terms.logit, torch.zeros_like(terms.logit))
    assert torch.equal(terms.difference, torch.zeros_like(terms.difference))
    assert torch.equal(terms.loss, torch.full_like(terms.loss, math.log(2)))
    assert torch.equal(terms.accuracy, torch.full_like(terms.accuracy, 0.5))
    terms.loss.sum().backward()
    assert run.updater.grad_norm(1.0) > 0


@pytest.mark.long
@pytest.mark.parametrize("kind", ["sd2v", "sdxl", "sdxl-turbo"])
@pytest.mark.parametrize(
    "flags", [[], ["--precision", "fp16"], ["--lora", "--precision", "bf16"]], ids=["full", "full fp16", "lora bf16"]
)
def test_families(world, tmp_path, kind, flags):
    run = make_run(world(kind), world("pairs"), tmp_path, "--batch-size", "3", *flags)
    terms = first_terms(run)
    assert not terms.logit.any()
    if kind == "sdxl-turbo":
        assert set(terms.timesteps.tolist()) <= {249, 499, 749}


@pytest.mark.parametrize("kind", TRAINED)
@pytest.mark.parametrize(
    "flags",
    ["full", *(pytest.param(name, marks=pytest.mark.long) for name in ("bf16 autocast, lora", "checkpointing", "dde"))],
)
def test_families_of_flow_matching(world, tmp_path, kind, flags):
    draw = ["--timestep-draw", "logit-normal"] if flags == "full" else []
    run = make_run(world(kind), world("pairs"), tmp_path, "--batch-size", "3", *SMALL, *PATHS[flags], *draw)
    terms = first_terms(run)
    assert not terms.logit.any() and torch.equal(terms.loss, torch.full_like(terms.loss, math.log(2)))
    terms.loss.sum().backward()
    assert run.updater.grad_norm(1.0) > 0


def test_policy_and_reference_both_get_contiguous_projections(world, tmp_path, monkeypatch):
    """Tested apart: on some processors a strided input changes no bit, and the logits above are 0 without this."""
    fixed = []
    monkeypatch.setattr(ready, "fix_projections", lambda unet: fixed.append(unet) or fix_projections(unet))
    run = make_run(world("sd2v"), world("pairs"), tmp_path, "--batch-size", "2", "--precision", "fp16")
    assert len(fixed) == 2 and fixed[0] is run.model.denoiser and fixed[1] is not run.model.denoiser  # then the copy
    hooked = [block.proj_in for unet in fixed for block in unet.modules() if isinstance(block, Transformer2DModel)]
    assert len(hooked) >= 2 and all(module._forward_pre_hooks for module in hooked)


@pytest.mark.parametrize(
    "shape", [name if name == "apo-zero" else pytest.param(name, marks=pytest.mark.slow) for name in LOSS]
)
def test_shapes(world, tmp_path, shape):
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2", "--loss", shape)
    terms = first_terms(run)
    assert torch.equal(terms.loss, torch.full_like(terms.loss, LOSS[shape]))


def test_a_loss_that_reads_soft_labels_is_refused_without_any(world, tmp_path):
    with pytest.raises(UserError, match="--loss smpo scales each pair by how sure its label is"):
        make_run(world("sd15"), world("pairs"), tmp_path, "--loss", "smpo")


def test_another_policy_moves_the_logit(world, tmp_path):
    """The checks above can fail: after a change of one weight the logits are not 0."""
    run = make_run(world("sd15"), world("pairs"), tmp_path, "--batch-size", "2")
    with torch.no_grad():
        run.updater.parameters[0].add_(0.01)
    assert first_terms(run).logit.abs().min() > 0
