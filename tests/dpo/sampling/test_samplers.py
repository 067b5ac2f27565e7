"""dpo.sampling.samplers: every name draws, with the model's own noise schedule and nothing clipped."""

import json
import re

import pytest

from dpo.common.errors import UserError
from dpo.models.load import load
from dpo.models.pipeline import pipeline_of
from dpo.sampling import flags, samplers


def test_the_command_offers_them_all():
    assert (samplers.OWN, *samplers.SAMPLERS) == flags.SAMPLERS


@pytest.mark.long
@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_a_sampler_follows_the_models_schedule(world, name):
    pipe = pipeline_of(load(world("sd15")))
    own = dict(pipe.scheduler.config)
    samplers.use(pipe, name)
    kept = samplers.settings(pipe)
    assert type(pipe.scheduler).__name__ == samplers.SAMPLERS[name][0]
    assert {key: kept[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")} == {
        key: own[key] for key in ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps")
    }
    assert not kept.get("clip_sample") and not any(key.startswith("_") for key in kept)
    again = type(pipe.scheduler).from_config(json.loads(json.dumps(kept)))  # from a protocol, as anybody redraws
    for scheduler in (again, pipe.scheduler):
        scheduler.set_timesteps(5)
    assert again.timesteps.tolist() == pipe.scheduler.timesteps.tolist()
    pipe.scheduler = again
    latents = pipe("a thing", num_inference_steps=3, guidance_scale=2.0, output_type="latent").images
    assert latents.isfinite().all()


def test_a_sampler_without_zero_terminal_snr_is_refused(world):
    pipe = pipeline_of(load(world("sd2v")))
    pipe.scheduler.register_to_config(rescale_betas_zero_snr=True)
    samplers.use(pipe, "ddim")
    with pytest.raises(UserError, match="--sampler heun: has no zero terminal SNR"):
        samplers.use(pipe, "heun")


def test_a_sampler_of_diffusion_is_refused_to_a_flow(world):
    """Its latents are another mixture of image and noise: every image would be spoilt."""
    pipe = pipeline_of(load(world("sd35")))
    own = pipe.scheduler
    for name in samplers.SAMPLERS:
        with pytest.raises(UserError, match=f"--sampler {re.escape(name)}: .* is a model of flow matching"):
            samplers.use(pipe, name)
    samplers.use(pipe, samplers.OWN)
    assert pipe.scheduler is own
