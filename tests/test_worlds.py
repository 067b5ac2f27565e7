"""The tiny pipelines and sets that all other tests stand on."""

import numpy as np
import pytest
import torch

from tests.help import worlds


@pytest.mark.parametrize("kind", worlds.KINDS)
def test_pipeline_loads_and_draws(kind, tmp_path):
    from diffusers import DiffusionPipeline

    pipeline = DiffusionPipeline.from_pretrained(worlds.make_pipeline(tmp_path, kind), local_files_only=True)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a red fox", num_inference_steps=2, guidance_scale=3.0, height=32, width=32).images[0]
    assert image.size == (32, 32)
    assert sum(f.stat().st_size for f in tmp_path.rglob("*")) < 2.5e6
    assert any(type(m).__name__ == "GEGLU" for m in pipeline.unet.modules())
    assert pipeline.scheduler.config.prediction_type == ("v_prediction" if kind == "sd2v" else "epsilon")


def test_latents_are_levelled_and_tell_winners_from_losers(tmp_path):
    from diffusers import AutoencoderKL

    vae = AutoencoderKL.from_pretrained(worlds.make_pipeline(tmp_path, "sd15"), subfolder="vae")
    means = []
    for good in (True, False):
        images = np.stack([np.asarray(worlds.draw(np.random.default_rng(500 + i), good)) for i in range(16)])
        with torch.no_grad():
            latents = vae.encode(torch.from_numpy(images).permute(0, 3, 1, 2) / 127.5 - 1).latent_dist.mean
        scaled = latents * vae.config.scaling_factor
        assert 0.7 < scaled.std() < 1.3
        means.append(scaled[:, 0].mean())
    assert means[0] - means[1] > 0.5


def test_the_same_arguments_give_the_same_files(tmp_path):
    for kind in ("a", "b"):
        worlds.make_pickapic(tmp_path / kind, 4, seed=3, ties=1, oddities=worlds.ODDITIES)
    files = [next((tmp_path / kind).rglob("*.parquet")).read_bytes() for kind in ("a", "b")]
    assert files[0] == files[1]
