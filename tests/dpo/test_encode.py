"""dpo.encode: what the VAE is given. Whole runs through the encoder: tests/runs/test_end_to_end.py."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dpo import encode
from dpo.encode import Encoder
from dpo.models.family import families
from tests.help.running import advance, make_run, weights


class Vae(nn.Module):
    """Keeps what it is given."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1, dtype=dtype))

    def encode(self, x: torch.Tensor) -> SimpleNamespace:
        self.seen = x
        return SimpleNamespace(latent_dist=SimpleNamespace(mean=x, std=x))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_pixels_are_scaled_exactly_and_rounded_once(dtype):
    """In bf16 arithmetic each grey level was 0.12 too high on average."""
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16).expand(1, 3, 16, 16)
    vae = Vae(dtype)
    Encoder(SimpleNamespace(vae=vae, family=families()["sd"]), torch.device("cpu"), vae_batch=8).posterior(pixels)
    exact = pixels.double() / 127.5 - 1
    assert vae.seen.dtype == dtype
    if dtype == torch.float32:  # as it was
        assert torch.equal(vae.seen, pixels.float() / 127.5 - 1)
    else:
        assert torch.equal(vae.seen, exact.float().to(dtype) if dtype != torch.float64 else exact)
    assert abs((vae.seen.double() - exact).mean() * 127.5) < 0.005  # grey levels


def _noted(trips, module, offload, own, where):
    trips.append((module, str(where), offload))
    return own(where)


@pytest.mark.long
@pytest.mark.parametrize("together", [64, pytest.param(4, marks=pytest.mark.slow)])
def test_encoders_that_travel_make_one_trip_for_many_micro_batches(world, tmp_path, monkeypatch, together):
    """With --offload; the run is the same to the bit."""
    monkeypatch.setattr(encode, "TOGETHER", together)
    flags = ["--batch-size", "2", "--accumulation", "4", "--caption-dropout", "0.3", "--keep-encoded", "off"]
    held = ["--validation-fraction", "0.3", "--validate-every", "9", "--validation-draws", "1"]
    ends, trips = [], []
    for offload in ("off", "on"):
        run = make_run(world("sd15"), world("pairs"), tmp_path / offload, *flags, *held, "--offload", offload)
        modules = [run.model.vae, *run.model.text_encoders]
        for module in modules:
            own = module.to
            module.to = partial(_noted, trips, module, offload, own)
        advance(run, 2)
        ends.append((weights(run), run.held_out.reference_errors))
        for module in modules:
            found = [where for who, where, how in trips if who is module and how == offload]
            trips_of_update = 8 // min(together, 8) if offload == "on" else 4
            assert len(found) == 2 * 2 * trips_of_update, "out and back, in two updates"
    assert all(torch.equal(ends[0][0][name], value) for name, value in ends[1][0].items())
    assert torch.equal(ends[0][1], ends[1][1])


def test_an_encoder_comes_back_from_a_trip_that_fails():
    encoder = Encoder(
        SimpleNamespace(vae=Vae(torch.float32), family=families()["sd"]), torch.device("cpu"), vae_batch=8, offload=True
    )
    with pytest.raises(AttributeError):
        encoder.posterior(None)
    assert not encoder.placed
