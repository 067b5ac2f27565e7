"""dpo.models.compiled: repeated blocks compiled in place, by a backend that keeps eager's arithmetic."""

import copy
import itertools

import pytest
import torch
import torch._dynamo

from dpo.models import compiled
from dpo.models.family import repeated
from dpo.models.load import load
from dpo.settings.resolve import learning_rate
from tests.help.flow import SMALL, TRAINED
from tests.help.running import advance, everything, make_run


@pytest.fixture(autouse=True)
def traced(monkeypatch):
    """torch's tracer and autograd, without the minutes of a C++ compiler: what is compiled runs as it was traced."""
    monkeypatch.setattr(compiled, "BACKEND", "aot_eager")
    names = "recompile_limit", "accumulated_recompile_limit", "fail_on_recompile_limit_hit"
    kept = {name: getattr(torch._dynamo.config, name) for name in names}
    yield
    torch._dynamo.reset()
    for name, value in kept.items():
        setattr(torch._dynamo.config, name, value)


@pytest.mark.long
def test_blocks_of_a_kind_share_what_is_compiled(world):
    """The copy costs no graph of its own, and the names of weights are those of diffusers."""
    unet = load(world("sd15")).denoiser.requires_grad_(False)
    twin, names = copy.deepcopy(unet), list(unet.state_dict())
    x = torch.randn(2, 4, 4, 4)
    args = x, torch.tensor([3, 900]), torch.randn(2, 16, unet.config["cross_attention_dim"])
    plain = unet(*args).sample
    blocks = [compiled.compile_blocks(each) for each in (unet, twin)]
    with compiled.watched() as first:
        found = unet(*args).sample
    with compiled.watched() as second:
        again = twin(*args).sample
    assert torch.equal(found, plain) and torch.equal(again, plain)
    assert 0 < first.graphs < blocks[0] == blocks[1] and second.graphs == 0 and list(unet.state_dict()) == names


@pytest.mark.long
@pytest.mark.parametrize(
    "kind", [pytest.param(kind, marks=[pytest.mark.slow] * (kind != "flux2-klein-base")) for kind in TRAINED]
)
def test_every_block_of_a_transformer_is_compiled(world, kind):
    model = load(world(kind), text_tokens=64)
    denoise, shape = model.denoise(model.denoiser), model.geometry
    x = (
        torch.randn(2, shape.channels, 4, 8),
        torch.tensor([30.0, 900.0]),
        model.family.encode(model, ["a fox", ""]),
        None,
    )
    with torch.no_grad():
        plain = denoise(*x)
        blocks = compiled.compile_blocks(model.denoiser)
        with compiled.watched() as found:
            assert torch.equal(denoise(*x), plain)
    kinds = [type(module) for module in repeated(model.denoiser).values()]
    assert blocks == len(kinds) and found.graphs >= len(set(kinds))


CASES = [("sd15", ["--lora", "--rank", "2"]), ("sd15", ["--method", "dde", "--checkpointing", "on"])]
CASES += [(kind, ["--lora", "--checkpointing", "on", *SMALL]) for kind in TRAINED]


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "flags"), CASES)
def test_a_compiled_run_is_the_run(world, tmp_path, caplog, kind, flags):
    """Also under checkpointing, and where the reference is the UNet with its adapters off."""
    caplog.set_level("INFO", "dpo")
    every = [*flags, "--batch-size", "2", "--accumulation", "2", "--precision", "fp64"]
    plain = make_run(world(kind), world("pairs"), tmp_path / "plain", *every)
    run = make_run(world(kind), world("pairs"), tmp_path / "run", *every, "--compile")
    assert "--compile: the logit of the first 8 pairs is exactly 0" in caplog.text
    (expected, _), (found, _) = advance(plain, 2), advance(run, 2)
    assert found["loss"] == expected["loss"] and found["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-12)
    before, after = everything(plain), everything(run)
    # What the last layers say of the text nobody reads: their gradient is none, in traced code 0, so that they decay there.
    unread = {name: value for name, value in after.items() if name not in before}
    assert before.keys() <= after.keys() and all(name.startswith("optimizer.") for name in unread)
    assert not any(value.any() for name, value in unread.items() if not name.endswith(".step"))
    optim, decayed = run.config.optim, 0
    for name, value in before.items():  # traced code takes sums of a backward pass in another order
        if unread and not torch.allclose(after[name], value, rtol=1e-9, atol=1e-9):
            value, decayed = value * (1 - learning_rate(run.config) * optim.weight_decay) ** run.done, decayed + 1
        torch.testing.assert_close(after[name], value, rtol=1e-9, atol=1e-9)
    assert decayed <= len(unread) // 3  # a parameter has three states


@pytest.mark.long
def test_more_variants_than_allowed_end_the_run_instead_of_running_uncompiled(world, monkeypatch):
    monkeypatch.setattr(compiled, "VARIANTS", 1)
    unet = load(world("sd15")).denoiser
    compiled.compile_blocks(unet)
    with pytest.raises(torch._dynamo.exc.FailOnRecompileLimitHit):
        unet(torch.randn(1, 4, 4, 4), 3, torch.randn(1, 16, unet.config["cross_attention_dim"]))


def test_the_first_update_says_what_was_compiled(caplog):
    caplog.set_level("INFO", "dpo")
    block = torch.compile(torch.sin, backend="aot_eager")
    step = compiled.told(lambda x: block(x))
    for x in itertools.repeat(torch.ones(2), 2):
        assert torch.equal(step(x), x.sin())
    assert [line for line in caplog.messages if line.startswith("--compile: 1 graph in the first update, ")] == [
        caplog.messages[0]
    ]
