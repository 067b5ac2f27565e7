"""A miniature of the world comes out of the build command, and a training loop resumes exactly."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from diffusers import StableDiffusionPipeline

from dpo.common import files
from dpo.tiny import build, evaluate, judge, sprites
from dpo.tiny.making import judges, loop, pipeline
from dpo.tiny.world import Renderer, world


def shorter(recipe: build.Recipe, steps: int, pictures: int) -> build.Recipe:
    def cut(plan: loop.Plan) -> loop.Plan:
        return replace(plan, steps=steps, batch=4)

    return replace(
        recipe,
        vae=cut(recipe.vae),
        vae_finish=cut(recipe.vae_finish),
        judges={name: cut(plan) for name, plan in recipe.judges.items()},
        decoder=cut(recipe.decoder),
        base=cut(recipe.base),
        pairs={"train": pictures, "validation": pictures},
        prompts={"tuning": pictures, "report": pictures},
        check=pictures,
    )


def rebuild(tmp_path, arguments=()):
    build.main(["--miniature", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), *arguments])
    record = json.loads((tmp_path / "out" / "build.json").read_text())
    for name, expected in record["sha256"].items():
        assert files.checksum(tmp_path / "out" / name) == expected
    assert {"NOTICE", "LICENSE-fluent-emoji", "prompts.json", "pairs/train.parquet", "judges/b.safetensors"} <= set(
        record["sha256"]
    )
    return record


def test_every_stage_runs_and_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 32)
    monkeypatch.setattr(build, "MINIATURE", shorter(build.MINIATURE, steps=2, pictures=2))
    record = rebuild(tmp_path)
    assert record["seed"] == 0 and record["stages"]["base"]["plan"]["steps"] == 2
    drawn_by = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "pipeline")
    assert drawn_by("a frog", num_inference_steps=1).images[0].size == (64, 64)
    assert pq.read_table(tmp_path / "out" / "pairs" / "train.parquet").num_rows == 2
    again = rebuild(tmp_path)  # everything is there: stages are not run again
    assert again["sha256"] == record["sha256"]
    elsewhere = rebuild(tmp_path / "elsewhere")  # from nothing: the same files, byte for byte
    assert elsewhere["sha256"] == record["sha256"] and len(record["sha256"]) > 15


@pytest.mark.slow
def test_a_miniature_learns_something(tmp_path):
    record = rebuild(tmp_path)
    assert record["stages"]["judges"]["a"]["object"] > 0.8
    assert record["stages"]["vae"]["psnr_db"] > 12


class Killed(Exception):
    pass


def test_training_resumes_exactly(tmp_path):
    small = world(3)
    render = Renderer(sprites.stand_ins(list(small.objects)))
    plan = loop.Plan(steps=4, batch=4, lr=1e-3, ema=0.9, warmup=2, save_every=2)

    def run(folder, on_save=None):
        torch.manual_seed(0)
        network = judge.ARCHITECTURES["b"](3)

        def loss_of(draw, batch):
            scenes = small.sample(draw.numpy, batch)
            return judges.loss_of(network, judges.blur(judge.pixels(render(scenes)), draw), scenes)

        loop.train(network, loss_of, plan, folder, on_save=on_save)
        return network.state_dict()

    def kill(module, step):
        raise Killed

    whole = run(tmp_path / "whole")
    with pytest.raises(Killed):
        run(tmp_path / "halves", kill)
    halves = run(tmp_path / "halves")
    assert all(torch.equal(whole[name], halves[name]) for name in whole)


def test_a_picture_depends_on_its_prompt_and_seed_alone(tmp_path):
    torch.manual_seed(0)
    tokenizer = build.text.tokenizer(tmp_path)
    parts = (pipeline.unet(), build.text.text_encoder(tokenizer), tokenizer, build.vae.build(), pipeline.scheduler())
    prompts, seeds = ["a frog on a red background", "an owl on a blue background", ""], [1, 2, 1]
    together = evaluate.draw(*parts, prompts, seeds, steps=2)
    alone = evaluate.draw(*parts, prompts[1:2], seeds[1:2], steps=2)
    assert np.abs(together[1].astype(int) - alone[0]).max() <= 1
    assert not np.array_equal(together[0], together[2])
