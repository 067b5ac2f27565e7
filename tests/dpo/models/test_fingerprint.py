"""dpo.models.fingerprint: equal for equal weights and tokenizers, another for others."""

import torch

from dpo.models.fingerprint import checksum, fingerprint, identity
from dpo.models.load import load
from tests.help.worlds import make_pipeline


def test_fingerprint(pipelines, tmp_path):
    one, same = load(str(pipelines["sd15"])).denoiser, load(str(pipelines["sd15"])).denoiser
    other = load(str(make_pipeline(tmp_path / "other", "sd15", seed=1))).denoiser
    assert fingerprint(one) == fingerprint(same) != fingerprint(other)
    with torch.no_grad():
        for parameter in same.parameters():
            parameter.add_(1e-5)
    assert fingerprint(one) != fingerprint(same)


def test_a_checksum_sees_every_number(pipelines):
    one, same = load(str(pipelines["sd15"])).denoiser, load(str(pipelines["sd15"])).denoiser
    assert checksum(one) == checksum(same) != checksum(one, same)
    weight = max(same.parameters(), key=torch.numel).data.view(-1)
    weight[1] += 1e-3  # lies between those that the short hash reads
    assert fingerprint(one) == fingerprint(same) and checksum(one) != checksum(same)
    weight[1] -= 1e-3
    same.load_state_dict(one.state_dict())
    assert checksum(one) == checksum(same) != checksum(same.to(torch.bfloat16))


def test_identity_is_of_what_encodes(pipelines, tmp_path):
    """A store goes with the encoders it was made with, whatever the denoiser is."""
    one, two = load(str(pipelines["sd15"])), load(str(pipelines["sd15"]))
    own = identity(one)
    with torch.no_grad():
        two.denoiser.conv_in.weight.add_(1)
    assert identity(two) == own
    two.tokenizers[0].add_tokens(["<a-new-word>"])
    assert [name for name, value in identity(two).items() if value != own[name]] == ["tokenizers"]
    other = identity(load(str(pipelines["sd15"]), vae=str(make_pipeline(tmp_path / "other", "sd15", seed=1))))
    assert [name for name, value in other.items() if value != own[name]] == ["vae"]
    assert identity(load(str(pipelines["sdxl"])))["family"] == "sdxl"
