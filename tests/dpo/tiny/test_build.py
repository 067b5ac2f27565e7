"""A miniature of the world comes out of the build command."""

import json
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
from diffusers import StableDiffusionPipeline

from dpo.common import files
from dpo.tiny import build, outcome
from dpo.tiny.making import loop, pipeline, vae


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


@pytest.mark.slow
def test_every_stage_runs_and_is_recorded(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "CHUNK", 32)
    monkeypatch.setattr(vae, "CHECK", 32)
    monkeypatch.setattr(outcome, "STEPS", 4)
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
