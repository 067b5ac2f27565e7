"""What ships: whole, loadable by plain libraries, and drawing what its captions say."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import load_dataset
from diffusers import StableDiffusionPipeline

from dpo.common import files
from dpo.data.writing import PICKAPIC
from dpo.tiny import judge, paths, prompts
from dpo.tiny.build import drawn
from dpo.tiny.making import sprites
from dpo.tiny.making.scenes import Renderer, world
from dpo.tiny.world import COLOURS, PLAIN

MEGABYTE = 1_000_000


@pytest.fixture(scope="module")
def pipeline():
    loaded = StableDiffusionPipeline.from_pretrained(paths.pipeline_path())
    loaded.set_progress_bar_config(disable=True)
    return loaded


def record():
    return json.loads((paths.ASSETS / "build.json").read_text())


def test_artefacts_are_those_the_record_names_and_small():
    sums = record()["sha256"]
    shipped = {path.relative_to(paths.ASSETS).as_posix(): path for path in paths.ASSETS.rglob("*") if path.is_file()}
    assert set(shipped) - {"build.json"} == set(sums)
    assert all(files.checksum(shipped[name]) == expected for name, expected in sums.items())
    assert sum(path.stat().st_size for path in shipped.values()) < 16 * MEGABYTE
    assert not [name for name in shipped if name.endswith((".bin", ".pt", ".ckpt", ".pkl"))]


def test_the_record_holds_the_promised_figures():
    stages = record()["stages"]
    assert len(stages["sprites"]["objects"]) >= 24
    for name in ("a", "b"):
        assert stages["base"][f"seen_faithful_{name}"] >= 0.95
        assert stages["base"][f"held_out_faithful_{name}"] >= 0.95


def test_the_pipeline_draws_in_plain_diffusers(pipeline):
    image = pipeline("a frog on a purple background", num_inference_steps=4, guidance_scale=3.0).images[0]
    assert image.size == (64, 64)
    assert pipeline.unet.dtype == pipeline.text_encoder.dtype == torch.float32
    assert len(pipeline.tokenizer("a frog on a purple background").input_ids) == 8  # every word one token


@pytest.mark.slow
def test_drawings_obey_their_captions(pipeline):
    tuning = prompts.prompts("tuning")
    captions, seeds = tuning.captions[:12], tuning.seeds[:12]
    images = drawn(pipeline, captions, seeds)
    found = judge.load_judge("b")
    assert found.faithful(found.read(images), captions).sum() >= 10


@pytest.mark.parametrize("path, most", [(paths.train_pairs_path(), 800), (paths.validation_pairs_path(), 200)])
def test_pairs_load_in_datasets(path, most):
    rows = load_dataset("parquet", data_files=str(path), split="train")
    assert rows.column_names == PICKAPIC.names and len(PICKAPIC) == 19
    assert pq.read_schema(path).equals(PICKAPIC, check_metadata=False)
    labels = np.array(rows["label_0"])
    assert set(labels) <= {0.0, 0.5, 1.0} and np.allclose(labels + np.array(rows["label_1"]), 1)
    assert 0.8 * most <= (labels != 0.5).sum() <= len(rows) <= most
    assert 0.4 < labels.mean() < 0.6
    row = rows[int(np.argmax(labels == 1.0))]
    assert row["best_image_uid"] == row["image_0_uid"] and row["jpg_0"][:3] == b"\xff\xd8\xff"


def test_captions_and_seeds_of_the_lists_are_disjoint():
    tuning, report = prompts.prompts("tuning"), prompts.prompts("report")
    drawn = {kind: set(pq.read_table(path)["caption"].to_pylist()) for kind, path in
             {"train": paths.train_pairs_path(), "validation": paths.validation_pairs_path()}.items()}  # fmt: skip
    lists = [set(tuning.captions), set(report.captions), *drawn.values()]
    assert len(set().union(*lists)) == sum(map(len, lists))
    assert not set(tuning.seeds) & set(report.seeds)
    assert len(tuning) >= 128 and len(report) >= 160


@pytest.mark.parametrize("name", ["a", "b"])
def test_judges_see_backdrop_size_and_colour_on_unknown_objects(name):
    """Shapes no judge was trained on: what does not depend on the object is read all the same."""
    scene_world = world(3)
    scenes = scene_world.sample(np.random.default_rng(0), 200, combinations="all")
    images = Renderer(sprites.stand_ins(list(scene_world.objects)))(scenes)
    reading = judge.load_judge(name).read(images)
    assert (reading.colour.argmax(-1) == scenes.colour).mean() > 0.9
    assert ((reading.plain > 0.5) == (scenes.backdrop == PLAIN)).mean() > 0.85
    assert reading.colour.shape == (200, len(COLOURS))
