"""How well noised pictures of a pair are told apart, against an observer that is shown some."""

import itertools

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import DDPMScheduler
from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

from benchmarks import apart
from dpo.tiny import paths
from dpo.tiny.making import detail


@pytest.mark.long
def test_it_is_what_an_observer_reaches(tmp_path, monkeypatch):
    """The observer knows both pictures and takes the nearer one."""
    monkeypatch.setattr(apart, "PAIRS", 8)
    detail.write(tmp_path)
    found = apart.told_apart(tmp_path / "train.parquet")
    vae = AutoencoderKL.from_pretrained(paths.pipeline_path() / "vae")
    table = pq.read_table(tmp_path / "train.parquet", columns=["jpg_0", "jpg_1"]).slice(0, 8)
    with torch.no_grad():
        latents = [
            vae.encode(apart._pixels(table[name].to_pylist())).latent_dist.mean * vae.config.scaling_factor
            for name in ("jpg_0", "jpg_1")
        ]
    abar = DDPMScheduler.from_pretrained(paths.pipeline_path() / "scheduler").alphas_cumprod
    generator = torch.Generator().manual_seed(0)
    for tenth in (1, 5, 9):
        signal, spread = abar[100 * tenth + 50].sqrt(), (1 - abar[100 * tenth + 50]).sqrt()
        right = []
        for truth in (0, 1):
            for _ in range(400):
                seen = signal * latents[truth] + spread * torch.randn(latents[0].shape, generator=generator)
                near = [((seen - signal * one) ** 2).flatten(1).sum(1) for one in latents]
                right.append((near[truth] < near[1 - truth]).double().mean().item())
        assert found[tenth] == pytest.approx(np.mean(right), abs=0.015)
    assert all(before > after for before, after in itertools.pairwise(found))


@pytest.mark.slow
def test_the_first_taste_outlives_noise_longer_than_detail(tmp_path):
    detail.write(tmp_path)
    first, second = apart.told_apart(paths.train_pairs_path()), apart.told_apart(tmp_path / "train.parquet")
    assert first[7] > 0.99 and second[7] < 0.75 and second[0] > 0.95
