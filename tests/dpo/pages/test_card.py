"""dpo.pages.card: front matter that the hub can read, and the figures of the run."""

import shutil

import diffusers
import pytest

from dpo.pages.card import model_card, write_model_card
from dpo.tiny.paths import pipeline_path
from dpo.training import results
from tests.help.fake_run import KINDS, run_of
from tests.help.running import make_run


@pytest.fixture
def runs():
    return {kind: run_of(kind) for kind in KINDS}


def front_matter(card):
    from huggingface_hub import ModelCard

    return ModelCard(card).data.to_dict()


@pytest.mark.long
def test_front_matter_of_an_adapter(runs):
    found = front_matter(model_card(runs["lora-gpu"]))
    assert (
        found["base_model"] == "stabilityai/stable-diffusion-xl-base-1.0" and found["base_model_relation"] == "adapter"
    )
    assert found["datasets"] == ["owner/pick-a-pic"] and found["library_name"] == "diffusers"
    assert {"lora", "diffusion-dpo", "text-to-image"} <= set(found["tags"])


def test_front_matter_names_no_local_paths(runs):
    run = runs["lora-gpu"]
    settings = {**run.settings, "model": {"model": "/home/me/sd15"}, "data": {"data": "pairs/*.parquet"}}
    assert {"base_model", "datasets"}.isdisjoint(front_matter(model_card(run._replace(settings=settings))))


def test_no_place_on_this_machine_is_published(runs):
    run = runs["lora-gpu"]
    model = {"model": "/home/me/sd15", "unet_init": "/home/me/sft/unet", "lora_init": "/home/me/a.safetensors"}
    settings = {**run.settings, "model": model, "data": {"data": r"D:\me\pairs"}}
    card = model_card(run._replace(settings=settings))
    assert "/home" not in card and "D:" not in card and 'from_pretrained("PATH_TO/sd15")' in card
    assert "with the preferences in `pairs`" in card and "LoRA `a.safetensors`" in card


def test_the_licence_of_the_base_is_in_the_front_matter_where_it_is_known(runs):
    run = runs["lora-gpu"]
    assert front_matter(model_card(run))["license"] == "openrail++" and "not known here" not in model_card(run)
    turbo = front_matter(of_model(run, "stabilityai/sdxl-turbo"))
    assert (turbo["license"], turbo["license_name"]) == ("other", "sai-nc-community") and "LICENSE" in turbo[
        "license_link"
    ]
    unknown = of_model(run, "owner/model")
    assert "license" not in front_matter(unknown) and "not known here: put it into the front matter" in unknown


def of_model(run, name):
    return model_card(run._replace(settings={**run.settings, "model": {**run.settings["model"], "model": name}}))


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_the_code_of_an_adapter_on_a_single_file_reads_one_file(runs, family):
    run = runs["lora-gpu"]
    run = run._replace(summary={**run.summary, "model": {"family": family}})
    code = _use(run._replace(settings={**run.settings, "model": {"model": "/home/me/jugger.safetensors"}}))
    kind = {"sd": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline"}[family]
    assert (
        f"from diffusers import {kind}\n" in code and f'{kind}.from_single_file("PATH_TO/jugger.safetensors")' in code
    )
    assert "from_pretrained" not in code and hasattr(getattr(diffusers, kind), "from_single_file")


def started(run, **named):
    return model_card(run._replace(settings={**run.settings, "model": {**run.settings["model"], **named}}))


def test_a_run_that_has_a_name_is_titled_by_it(runs):
    run = runs["lora-gpu"]
    named = run._replace(settings={**run.settings, "output": {**run.settings["output"], "run_name": "red foxes"}})
    assert "\n---\n\n# red foxes\n" in model_card(named)
    assert "# stable-diffusion-xl-base-1.0 aligned by Diffusion-DPO\n" in model_card(run)


def test_what_the_training_began_with(runs):
    """What has to be loaded for the trained model is said, and what must not be loaded twice."""
    plain = model_card(runs["lora-gpu"])
    assert "The training began" not in plain and "pipe.unet" not in plain
    card = started(runs["lora-gpu"], lora_init="runs/sft")
    assert "began with the LoRA `runs/sft`, which is part of this adapter: do not load it as well." in card
    assert "| lora init | runs/sft |" in card and "pipe.unet" not in card
    card = started(runs["lora-gpu"], unet_init="runs/sft/unet")
    assert (
        "began with the weights `sft/unet`." in card and "# first put the weights of sft/unet into the pipeline" in card
    )
    card = started(runs["good"], lora_init="runs/sft", unet_init="u")
    assert "began with the LoRA `runs/sft`." in card and "pipe.unet" not in card and "load_lora_weights" not in card


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_card(runs, kind):
    card = model_card(runs[kind])
    assert front_matter(card)["pipeline_tag"] == "text-to-image" and "## Training" in card and "None |" not in card


def test_what_a_reader_needs(runs):
    card = model_card(runs["good"])
    for part in (
        "| beta | 2000 |",
        "| learning rate | 1e-05 |",
        "held-out preference accuracy | 0.633 (95 %",
        "It worked",
        "2311.12908",
    ):
        assert part in card
    assert "gamma" not in card and "| sft weight |" not in card and "| seed | 0 |" in card
    assert (
        "![" in card
        and "samples/step-00000060.png" in card
        and "from_pretrained" in card
        and "load_lora_weights" not in card
    )
    assert "2411.14871" in model_card(runs["dde"]) and "2311.12908" not in model_card(runs["sft"])
    assert 'load_lora_weights("' in model_card(runs["lora-gpu"]) and "scheduler" not in _use(runs["lora-gpu"])


def _use(run):
    return model_card(run).partition("## Use")[2].partition("## Training")[0]


@pytest.mark.parametrize("kind", [None, "DDIMScheduler"])
def test_an_adapter_is_used_with_the_scheduler_that_it_was_trained_by(runs, kind):
    """The base model brings its own; the lines that change it run as they stand."""
    changed = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    changed |= {"_class_name": kind, "clip_sample": False} if kind else {}
    run = runs["lora-gpu"]
    run = run._replace(summary={**run.summary, "scheduler": changed})
    code = _use(run).partition("```python")[2].partition("```")[0]
    base = diffusers.DDIMScheduler() if kind is None else diffusers.PNDMScheduler()
    pipe = type("Pipe", (), {"scheduler": base})()
    exec("\n".join(line for line in code.splitlines() if "scheduler" in line.lower()), {"pipe": pipe})
    assert type(pipe.scheduler) is diffusers.DDIMScheduler
    assert all(pipe.scheduler.config[name] == value for name, value in changed.items() if name[0] != "_")


def test_an_interrupted_run_says_so(runs):
    assert "interrupted after 6 of 60 updates" in model_card(runs["early"])


def test_user_text_cannot_break_out(runs):
    run = runs["good"]
    evil = 'x"\n---\ntags: [evil]\n<script>alert(1)</script> | `rm`'
    settings = {**run.settings, "model": {"model": evil}, "data": {"data": evil}}
    summary = {**run.summary, "data": {"<script>": "a|b"}, "device": "<img src=x>"}
    card = model_card(run._replace(settings=settings, summary=summary))
    assert "evil" not in front_matter(card)["tags"]
    outside = card.replace("`" + " ".join(evil.split()).replace("`", "'") + "`", "")
    assert "<script>" not in outside and "<img" not in card and "a\\|b" in card


def test_the_card_lies_in_the_run_folder(runs, tmp_path):
    shutil.copytree(runs["good"].folder, tmp_path / "run")
    path = write_model_card(tmp_path / "run")
    assert (
        path.parent == tmp_path / "run"
        and path.name == "README.md"
        and path.read_text(encoding="utf-8") == model_card(runs["good"])
    )


def code_of(card, folder):
    code = card.split("```python\n")[1].split("```")[0]
    assert "THIS_FOLDER_OR_REPOSITORY" in code
    return code.replace("THIS_FOLDER_OR_REPOSITORY", str(folder)).replace(
        '(prompt="a prompt")', '(prompt="a prompt", num_inference_steps=1)'
    )


@pytest.mark.long
def test_the_code_of_an_adapter_on_the_embedded_world_runs(runs, world, tmp_path):
    model = str(pipeline_path())
    results.write(make_run(model, world("pairs"), tmp_path, "--lora", "--rank", "2", "--batch-size", "1"))
    run = runs["lora-gpu"]
    card = model_card(run._replace(settings={**run.settings, "model": {"model": model}}))
    found = {}
    exec(code_of(card, tmp_path), found)
    assert found["image"].size == (64, 64) and "default_0" in found["pipe"].get_list_adapters()["unet"]


def test_captions_are_as_long_as_in_training(runs):
    run = runs["lora-gpu"]
    card = model_card(run._replace(settings={**run.settings, "model": {"model": "owner/model", "text_tokens": 128}}))
    assert 'image = pipe(prompt="a prompt", max_sequence_length=128).images[0]' in card


def test_the_code_of_other_adapters_names_their_model(runs):
    assert code_of(model_card(runs["lora-gpu"]), "x") == (
        "from diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("stabilityai/stable-diffusion-xl-base-1.0")\n'
        'pipe.load_lora_weights("x", weight_name="pytorch_lora_weights.safetensors")\n'
        'image = pipe(prompt="a prompt", num_inference_steps=1).images[0]\n'
    )


@pytest.mark.parametrize(("family", "scale"), [("flux", "guidance_scale"), ("qwen", "true_cfg_scale")])
def test_the_code_of_a_few_steps_model_draws_in_them(runs, family, scale):
    own = {"family": family, "timesteps": "turbo", "model": "owner/model"}
    drawn = {"sample_steps": 4, "sample_guidance": 0.0}
    method = {**runs["lora-gpu"].settings.get("method", {}), "window_high": 1000}
    groups = {**runs["lora-gpu"].settings, "model": own, "output": drawn, "method": method}
    card = model_card(runs["lora-gpu"]._replace(settings=groups))
    assert f'pipe(prompt="a prompt", num_inference_steps=4, {scale}=0).images[0]' in card
    assert "four of a distilled model, of 0 to 999" in card


@pytest.mark.parametrize("kind", ["good", "lora-gpu"])
def test_the_code_names_the_parts_that_a_pipeline_came_without(runs, kind):
    run = runs[kind]._replace(summary={**runs[kind].summary, "absent": {"text_encoder_3": None, "tokenizer_3": None}})
    settings = {**run.settings, "model": {"model": "owner/model"}}
    assert '", text_encoder_3=None, tokenizer_3=None)\n' in model_card(run._replace(settings=settings))
