"""The tiny pipelines of flow-matching families that tests run on are whole: diffusers itself loads them and draws."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from safetensors.torch import load_file

from tests.help.flow import FLOWS, make_flow

# Where the index says that they are left out, diffusers wants to be told so as well.
REQUIRED = ("text_encoder_3", "tokenizer_3")
PATH = "transformer/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize("kind", FLOWS)
def test_diffusers_loads_each_and_draws_what_the_prompt_says(kind, tmp_path):
    folder = make_flow(tmp_path, kind)
    assert sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) < 2**21
    index = json.loads((folder / "model_index.json").read_text("utf-8"))
    without = {name: None for name, part in index.items() if name in REQUIRED and part[0] is None}
    pipeline = DiffusionPipeline.from_pretrained(folder, **without)
    pipeline.set_progress_bar_config(disable=True)

    def draw(prompt: str) -> np.ndarray:
        noise = torch.Generator().manual_seed(3)
        return pipeline(
            prompt=prompt, height=64, width=64, num_inference_steps=2, generator=noise, output_type="np"
        ).images[0]

    fox, cat = draw("a red fox"), draw("a blue cat")
    assert fox.shape == (64, 64, 3)
    assert np.isfinite(fox).all() and np.isfinite(cat).all()
    assert fox.std() > 0.01
    assert np.abs(fox - cat).mean() > 0.003


def test_what_qwen_image_drops_is_its_template_and_nothing_of_the_caption(tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(make_flow(tmp_path, "qwen-image"))
    before, after = pipeline.prompt_template_encode.split("{}")
    assert len(pipeline.tokenizer(before).input_ids) == pipeline.prompt_template_encode_start_idx
    caption = pipeline.tokenizer("a red fox" + after).input_ids
    with torch.no_grad():
        assert pipeline.encode_prompt("a red fox")[0].shape[1] == len(caption)


def test_a_seed_is_a_model(tmp_path):
    weights = [load_file(make_flow(tmp_path / str(seed), "sd3", seed) / PATH) for seed in (0, 1)]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        again = FLOWS["sd3"]("sd3").transformer.state_dict()
    assert all(torch.equal(again[name], weight) for name, weight in weights[1].items())
    # pos_embed.pos_embed is a table of sines, and no two seeds of anything else agree
    assert [name for name, weight in weights[0].items() if torch.equal(weight, weights[1][name])] == [
        "pos_embed.pos_embed"
    ]
