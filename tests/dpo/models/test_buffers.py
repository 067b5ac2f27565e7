"""dpo.models.buffers: what is in no file is not rounded, and encodings of versions that rounded it are told from others."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpo.common.errors import UserError
from dpo.models.buffers import cast_weights, positions
from dpo.models.fingerprint import encoders, identity
from dpo.models.load import load
from dpo.training import stored


class Rotary(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]), persistent=False)
        self.register_buffer("count", torch.tensor([3]), persistent=False)
        self.register_buffer("mean", torch.tensor([0.1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_what_is_in_no_file_keeps_its_digits(dtype):
    module = nn.Sequential(nn.Linear(2, 2), Rotary())
    cast_weights(module, dtype)
    assert module[0].weight.dtype == module[1].mean.dtype == dtype
    assert torch.equal(module[1].frequencies, torch.tensor([1.0, 0.1])) and module[1].count.dtype == torch.int64


def test_only_what_was_rounded_is_told_apart():
    assert positions("bf16", Rotary()) == positions("bf16-pure, VAE fp32", nn.Linear(2, 2), Rotary())
    assert positions("bf16", Rotary()) and not positions("bf16", nn.Linear(2, 2))
    assert not positions("fp32", Rotary()) and not positions("fp32, VAE bf16", Rotary())


def test_a_store_with_rounded_positions_is_refused_and_no_other(world, monkeypatch):
    monkeypatch.setattr(stored, "of_store", lambda source: source)
    for kind, rounds in (("qwen-image", True), ("sd35", False)):
        model = load(world(kind))
        known = identity(model) | encoders(model)

        def store(precision, known=known, **more):
            return SimpleNamespace(
                contents=SimpleNamespace(folder="s", settings={**known, "precision": precision, **more})
            )

        for good in (store("fp32"), store("bf16", positions="fp32") if rounds else store("bf16, VAE fp32")):
            stored.check(model, good)
        if rounds:
            with pytest.raises(UserError, match="s was prepared in bf16 by an earlier version.*prepare another store"):
                stored.check(model, store("bf16"))
