"""Command lines of other trainers run to their end with --compat added: only paths, sizes and counts are ours."""

import json
import shlex

import pytest
import torch
from safetensors import safe_open

from dpo.pages.folder import ADAPTER_FILE
from tests.help.commands import command
from tests.help.trackers import fake_wandb
from tests.help.worlds import make_pickapic

# Copied from those projects' README and launchers; braces hold the paths, sizes and counts that are ours.
HF_SD15 = """--pretrained_model_name_or_path={sd15} --output_dir={out} --mixed_precision="fp16" --dataset_name={pairs}
  --resolution=32 --train_batch_size=4 --gradient_accumulation_steps=2 --gradient_checkpointing --use_8bit_adam --rank=8
  --learning_rate=1e-5 --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=0 --max_train_steps=3
  --checkpointing_steps=2 --run_validation --validation_steps=2 --seed="0" --report_to="wandb" --push_to_hub"""
HF_SDXL = """--pretrained_model_name_or_path={sdxl} --pretrained_vae_model_name_or_path={sdxl}/vae --output_dir={out}
  --mixed_precision="fp16" --dataset_name={pairs} --train_batch_size=4 --gradient_accumulation_steps=2 --gradient_checkpointing
  --use_8bit_adam --rank=8 --learning_rate=1e-5 --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=0
  --max_train_steps=3 --checkpointing_steps=2 --run_validation --validation_steps=2 --seed="0" --report_to="wandb" --push_to_hub
  --resolution=32"""
SF_SD15 = """--pretrained_model_name_or_path={sd15} --dataset_name={pairs} --train_batch_size=1 --dataloader_num_workers=1
  --gradient_accumulation_steps=4 --max_train_steps=3 --lr_scheduler="constant_with_warmup" --lr_warmup_steps=1
  --learning_rate=1e-8 --scale_lr --cache_dir={cache} --checkpointing_steps 2 --beta_dpo 5000 --output_dir={out}
  --resolution=32"""
SF_SDXL = """--pretrained_model_name_or_path={sdxl} --pretrained_vae_model_name_or_path={sdxl}/vae --dataset_name={pairs}
  --train_batch_size=1 --dataloader_num_workers=1 --gradient_accumulation_steps=4 --max_train_steps=3
  --lr_scheduler="constant_with_warmup" --lr_warmup_steps=1 --learning_rate=1e-8 --scale_lr --cache_dir={cache}
  --checkpointing_steps 2 --beta_dpo 5000 --sdxl --output_dir={out} --resolution=32"""
LINES = {
    "diffusers SD1.5": (HF_SD15, "hf-sd15", "StableDiffusionPipeline", 5000.0),
    "diffusers SDXL": (HF_SDXL, "hf-sdxl", "StableDiffusionXLPipeline", 5000.0),
    "Salesforce SD1.5": (SF_SD15, "sf", "StableDiffusionPipeline", 5000.0),
    "Salesforce SDXL": (SF_SDXL, "sf", "StableDiffusionXLPipeline", 5000.0),
}
CHEAP = ["--sample-steps", "1", "--sample-seeds", "0", "--sample-prompts", "a red fox"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("line", "peer", "pipeline", "beta"),
    [pytest.param(*line, id=name, marks=[pytest.mark.slow] * ("SDXL" in name)) for name, line in LINES.items()],
)
def test_a_copied_command_line_runs_to_its_end(world, tmp_path, capsys, monkeypatch, brief, line, peer, pipeline, beta):
    import diffusers

    tracked = fake_wandb(monkeypatch, [])

    lora = peer.startswith("hf")
    pairs = make_pickapic(tmp_path / "pairs", 12, ties=2, split="validation" if lora else "train")  # its default
    places = {
        "sd15": world("sd15"),
        "sdxl": world("sdxl"),
        "pairs": pairs,
        "out": tmp_path / "out",
        "cache": tmp_path / "cache",
    }
    said = command(capsys, *shlex.split(line.format(**places)), "--compat", peer, *CHEAP)
    assert said.code == 0 and said.errors == [], said.errors
    out = tmp_path / "out"
    figures = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    losses = [row["loss"] for row in figures if "loss" in row]
    assert len(losses) == 3 and losses[0] == pytest.approx(0.693147, abs=1e-6), "policy and reference begin as one"
    assert any(f"beta {beta:g}" in row for row in said.log) and len(said.warnings("the hub")) == lora
    assert len([call for call in tracked if call[0] == "init"]) == lora
    assert {path.name for path in (out / "checkpoints").iterdir()} == {"step-00000002", "step-00000003"}

    pipe = getattr(diffusers, pipeline).from_pretrained(places["sdxl" if "XL" in pipeline else "sd15"] if lora else out)
    if lora:
        pipe.load_lora_weights(out, weight_name=ADAPTER_FILE)
        assert {config.r for config in pipe.unet.peft_config.values()} == {8}
    else:
        with safe_open(next((out / "unet").glob("*.safetensors")), framework="pt") as file:
            assert set(file.keys()) == set(pipe.unet.state_dict())
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red fox", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert image.size == (32, 32)
