"""Command lines copied from other trainers: what they become, what is refused, what the log says."""

import shlex
from pathlib import Path

import pytest

from dpo.common.errors import UserError
from dpo.settings.advice import headline, warnings
from dpo.settings.compat import FOREIGN, NOT_OFFERED, PEERS, flags_page
from dpo.settings.config import flatten, specs
from dpo.settings.flags import parse
from dpo.settings.resolve import dealt, learning_rate

BASE = ["--pretrained_model_name_or_path=m", "--dataset_name=d"]

HF_SD15 = """--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --output_dir="diffusion-dpo" --mixed_precision="fp16"
  --dataset_name=kashif/pickascore --resolution=512 --train_batch_size=16 --gradient_accumulation_steps=2
  --gradient_checkpointing --use_8bit_adam --rank=8 --learning_rate=1e-5 --report_to="wandb" --lr_scheduler="constant"
  --lr_warmup_steps=0 --max_train_steps=10000 --checkpointing_steps=2000 --run_validation --validation_steps=200 --seed="0"
  --report_to="wandb" --push_to_hub"""
HF_SDXL = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
  --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --output_dir="diffusion-sdxl-dpo" --mixed_precision="fp16"
  --dataset_name=kashif/pickascore --train_batch_size=8 --gradient_accumulation_steps=2 --gradient_checkpointing
  --use_8bit_adam --rank=8 --learning_rate=1e-5 --report_to="wandb" --lr_scheduler="constant" --lr_warmup_steps=0
  --max_train_steps=2000 --checkpointing_steps=500 --run_validation --validation_steps=50 --seed="0" --report_to="wandb"
  --push_to_hub"""
HF_TURBO = HF_SDXL.replace("stable-diffusion-xl-base-1.0", "sdxl-turbo") + " --is_turbo --resolution 512"
SF_SD15 = """--pretrained_model_name_or_path=runwayml/stable-diffusion-v1-5 --dataset_name=yuvalkirstain/pickapic_v2
  --train_batch_size=1 --dataloader_num_workers=16 --gradient_accumulation_steps=128 --max_train_steps=2000
  --lr_scheduler="constant_with_warmup" --lr_warmup_steps=500 --learning_rate=1e-8 --scale_lr
  --cache_dir="/export/pick_a_pic_v2/" --checkpointing_steps 500 --beta_dpo 5000 --output_dir="tmp-sd15" """
SF_SDXL = """--pretrained_model_name_or_path=stabilityai/stable-diffusion-xl-base-1.0
  --pretrained_vae_model_name_or_path=madebyollin/sdxl-vae-fp16-fix --dataset_name=yuvalkirstain/pickapic_v2
  --train_batch_size=1 --dataloader_num_workers=16 --gradient_accumulation_steps=128 --max_train_steps=2000
  --lr_scheduler="constant_with_warmup" --lr_warmup_steps=200 --learning_rate=1e-8 --scale_lr
  --cache_dir="/export/pick_a_pic_v2/" --checkpointing_steps 200 --beta_dpo 5000 --sdxl --output_dir="tmp-sdxl" """

HF_COMMON = {
    "lora": True, "rank": 8, "split": "validation", "flip": True, "caption_dropout": 0.0, "beta": 5000.0, "precision": "fp16",
    "optimizer": "adamw8bit", "learning_rate": 1e-5, "scheduler": "constant", "warmup": 0, "checkpointing": "on", "wandb": True,
    "tensorboard": False, "push_to_hub": True, "seed": 0, "accumulation": 2, "data": "kashif/pickascore", "checkpoints_limit": 0,
    "ties": "drop", "scale_lr": False, "resume": None, "sample_steps": 25,
}  # fmt: skip
SF_COMMON = {
    "lora": False, "split": "train", "flip": True, "caption_dropout": 0.2, "beta": 5000.0, "precision": "fp16",
    "learning_rate": 1e-8, "scale_lr": True, "batch_size": 1, "accumulation": 128, "scheduler": "constant", "steps": 2000,
    "resume": "latest", "workers": 16, "tensorboard": True, "data": "yuvalkirstain/pickapic_v2", "timesteps": "all",
    "cache_dir": "/export/pick_a_pic_v2/", "checkpoints_limit": 0, "project": "tuning", "dropped_caption": "empty",
}  # fmt: skip
COPIED = {
    "hf-sd15": (HF_SD15, "hf-sd15", HF_COMMON | {
        "model": "runwayml/stable-diffusion-v1-5", "family": "sd", "resolution": 512, "batch_size": 16, "steps": 10000,
        "checkpoint_every": 2000, "validate_every": 200, "sample_every": 200, "output": "diffusion-dpo", "timesteps": "all",
        "project": "diffusion-dpo-lora",
    }),
    "hf-sdxl": (HF_SDXL, "hf-sdxl", HF_COMMON | {
        "model": "stabilityai/stable-diffusion-xl-base-1.0", "vae": "madebyollin/sdxl-vae-fp16-fix", "family": "sdxl",
        "resolution": 1024, "batch_size": 8, "steps": 2000, "checkpoint_every": 500, "validate_every": 50, "sample_every": 50,
        "vae_precision": "fp32", "output": "diffusion-sdxl-dpo", "timesteps": "all", "project": "diffusion-dpo-lora-sdxl",
    }),
    "hf-turbo": (HF_TURBO, "hf-sdxl", HF_COMMON | {
        "model": "stabilityai/sdxl-turbo", "vae": "madebyollin/sdxl-vae-fp16-fix", "family": "sdxl", "resolution": 512,
        "batch_size": 8, "steps": 2000, "checkpoint_every": 500, "validate_every": 50, "sample_every": 50,
        "vae_precision": "fp32", "output": "diffusion-sdxl-dpo", "timesteps": "turbo", "project": "diffusion-dpo-lora-sdxl",
    }),
    "sf-sd15": (SF_SD15, "sf", SF_COMMON | {
        "model": "runwayml/stable-diffusion-v1-5", "family": "sd", "resolution": 512, "optimizer": "adamw", "warmup": 500,
        "checkpoint_every": 500, "output": "tmp-sd15",
    }),
    "sf-sdxl": (SF_SDXL, "sf", SF_COMMON | {
        "model": "stabilityai/stable-diffusion-xl-base-1.0", "vae": "madebyollin/sdxl-vae-fp16-fix", "family": "sdxl",
        "resolution": 1024, "optimizer": "adafactor", "warmup": 200, "checkpoint_every": 200, "output": "tmp-sdxl",
        "checkpointing": "on",
    }),
}  # fmt: skip


@pytest.mark.parametrize("name", list(COPIED))
def test_a_copied_command_line_becomes_that_scripts_run(name):
    line, peer, expected = COPIED[name]
    cfg, notes = parse([*shlex.split(line), "--compat", peer])
    defaults = {name: spec.default for name, spec in specs().items()}
    expected = defaults | {"validation_fraction": 0.0, "warmup_start": "zero"} | expected
    assert flatten(cfg) == expected
    assert len(notes) <= 2 and peer in notes[0]


def test_the_copied_salesforce_lines_scale_the_rate_as_published():
    cfg, _ = parse([*shlex.split(SF_SD15), "--compat", "sf"])
    cfg = dealt(cfg, 16)  # passes are counted per process, as in that script
    assert learning_rate(cfg) == pytest.approx(2.048e-5)
    assert "2048 pairs" in headline(cfg, processes=16)
    assert not any("thousandth" in warning for warning in warnings(cfg))


@pytest.mark.parametrize("name", list(COPIED))
def test_without_compat_our_meanings_hold_and_the_log_says_so(name):
    cfg, notes = parse(shlex.split(COPIED[name][0]))
    assert not cfg.lora.lora and cfg.data.split == "train" and not cfg.data.flip and cfg.output.resume is None
    assert "--compat" in " ".join(notes)
    assert ("--rank" in " ".join(notes)) == name.startswith("hf")


PEER_FLAGS = """
pretrained_model_name_or_path pretrained_vae_model_name_or_path revision variant dataset_name dataset_config_name
dataset_split_name train_data_dir cache_dir output_dir seed resolution random_crop no_hflip train_batch_size num_train_epochs
max_train_steps gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps
beta_dpo sft loss_type rank use_8bit_adam use_adafactor allow_tf32 dataloader_num_workers adam_beta1 adam_beta2
adam_weight_decay adam_epsilon max_grad_norm mixed_precision enable_xformers_memory_efficient_attention checkpointing_steps
checkpoints_total_limit resume_from_checkpoint unet_init caption_column image_column vae_encode_batch_size lr_num_cycles
lr_power push_to_hub hub_token hub_model_id tracker_name noise_offset input_perturbation local_rank hard_skip_resume
choice_model dreamlike_pairs_only prior_generation_precision sdxl split validation_steps run_validation report_to
tracker_project_name logging_dir proportion_empty_prompts max_train_samples is_turbo
""".split()  # noqa: SIM905
VALUES = {
    "lr_scheduler": "linear",
    "mixed_precision": "bf16",
    "loss_type": "ipo",
    "report_to": "all",
    "choice_model": "pickscore",
}
REFUSED = {"noise_offset", "input_perturbation", "choice_model", "dreamlike_pairs_only"}


@pytest.mark.parametrize("name", PEER_FLAGS)
def test_every_peer_flag_is_accepted_or_refused_with_an_explanation(name):
    own = {alias: spec for spec in specs().values() for alias in (spec.name, *spec.meta["aliases"])}.get(name)
    switch = FOREIGN[name].switch if name in FOREIGN else own.kind is bool
    word = VALUES.get(name, "0.25" if own is None or own.kind is float else "16" if own.kind is int else "word")
    base = [*BASE[:1], "--data", "d"] if name == "train_data_dir" else BASE
    argv = [*base, f"--{name}", *([] if switch else ["d" if name == "train_data_dir" else word])]
    if name in REFUSED:
        with pytest.raises(UserError, match=f"--{name}: .*(leave it out|pass)"):
            parse(argv)
        return
    cfg, notes = parse(argv)
    changed = cfg != parse(base)[0]
    said = any(name in note and "no effect" in note for note in notes)
    assert changed or said or name in ("no_hflip", "train_data_dir")  # our default already; the same as --data


def test_a_data_set_by_name_wins_over_a_folder_as_in_the_salesforce_script():
    assert parse(["--model", "m", "--train_data_dir", "folder"])[0].data.data == "folder"
    cfg, notes = parse(["--train_data_dir", "folder", *BASE, "--compat", "sf"])
    assert cfg.data.data == "d" and any("--train_data_dir has no effect" in note for note in notes)
    with pytest.raises(UserError, match="--train_data_dir folder"):
        parse(["--train_data_dir", "folder", *BASE])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--batch-size", "2", "--train-batch-size", "3"], "--batch-size 2 and --train_batch_size 3 set one setting"),
        (["--lr", "1e-5", "--learning_rate", "2e-5"], "learning_rate, to different values: give one"),
        (["--tf32", "--no-allow-tf32"], "--tf32 and --no-allow_tf32"),
        (["--optimizer", "adamw", "--use_8bit_adam"], "--optimizer adamw and --use_8bit_adam"),
        (["--use_adafactor", "--use_8bit_adam"], "optimizer"),
        (["--precision", "bf16", "--mixed_precision", "no"], "--precision bf16 and --mixed_precision no"),
        (["--method", "dde", "--sft"], "method"),
        (["--beta", "5", "--beta_dpo", "7"], "--beta 5 and --beta_dpo 7"),
        (["--beta", "2500", "--beta_dpo", "2500", "--compat", "hf-sd15"], "beta 5000 here"),
    ],
)
def test_two_spellings_of_one_setting_must_agree(flags, words):
    with pytest.raises(UserError) as caught:
        parse([*BASE, *flags])
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_two_spellings_that_agree_are_one():
    for flags, name, value in (
        (["--batch-size", "2", "--train_batch_size=2"], "batch_size", 2),
        (["--lr", "1e-5", "--learning_rate", "0.00001"], "learning_rate", 1e-5),
        (["--precision", "fp32", "--mixed_precision", "no"], "precision", "fp32"),
        (["--optimizer", "adafactor", "--use_adafactor"], "optimizer", "adafactor"),
        (["--beta", "5000", "--beta_dpo", "2500", "--compat", "hf-sd15"], "beta", 5000.0),
        (["--report_to", "wandb", "--tensorboard"], "tensorboard", True),  # one more tracker, not another spelling
    ):
        assert flatten(parse([*BASE, *flags])[0])[name] == value


def test_adafactor_is_clipped_only_where_the_salesforce_script_clips():
    for flags, norm in (
        (["--use_adafactor"], 0.0),
        (["--use_adafactor", "--sdxl"], 0.0),
        (["--use_adafactor", "--max_grad_norm", "2"], 0.0),
        (["--sdxl"], 1.0),  # Adafactor too, but that script asks whether the flag was given
        ([], 1.0),
        (["--optimizer", "adafactor"], 1.0),  # our name, our meaning
    ):
        cfg, notes = parse([*BASE, *flags, "--compat", "sf"])
        assert cfg.optim.max_grad_norm == norm
        assert any("--max-grad-norm has no effect" in note for note in notes) == ("--max_grad_norm" in flags)
    cfg, notes = parse([*BASE, "--use_adafactor"])
    assert cfg.optim.max_grad_norm == 1.0 and any("--max-grad-norm 0" in note for note in notes)


@pytest.mark.parametrize("peer", PEERS)
def test_the_scripts_hold_no_pairs_out_and_begin_a_warm_up_at_zero(peer):
    cfg, _ = parse([*BASE, "--compat", peer])
    assert cfg.data.validation_fraction == 0 and cfg.optim.warmup_start == "zero"
    assert cfg.data.dropped_caption == ("empty" if peer == "sf" else "auto")  # the one script with dropout encodes ""
    assert cfg.runtime.vae_precision == ("fp32" if peer == "hf-sdxl" else "auto")
    held, _ = parse([*BASE, "--compat", peer, "--validation-fraction", "0.2"])
    assert held.data.validation_fraction == 0.2


def test_refused_flags_are_accepted_when_they_ask_for_nothing():
    quiet = ["--noise_offset", "0", "--input_perturbation=0.0", "--choice_model", "", "--unet_init", ""]
    assert parse([*BASE, *quiet])[0] == parse(BASE)[0]


def test_values_that_are_not_offered_say_what_to_use():
    for word in NOT_OFFERED:
        for flag in ("--lr_scheduler", "--scheduler"):
            with pytest.raises(UserError, match=rf"^{flag} {word}: not offered, use .*linear"):
                parse([*BASE, flag, word])
    for flags, words in (
        (["--report_to", "comet_ml"], "tensorboard, wandb"),
        (["--loss_type", "cpo"], "sigmoid, hinge, ipo"),
    ):
        with pytest.raises(UserError, match=words):
            parse([*BASE, *flags])


def test_the_factor_in_beta():
    for peer, beta in (("hf-sd15", 5000.0), ("hf-sdxl", 2500.0), ("sf", 2500.0)):
        assert parse([*BASE, "--beta_dpo", "2500", "--compat", peer])[0].method.beta == beta
        assert parse([*BASE, "--compat", peer])[0].method.beta == 5000.0
        assert parse([*BASE, "--beta", "2500", "--compat", peer])[0].method.beta == 2500.0, "our name, our meaning"
    cfg, notes = parse([*BASE, "--beta_dpo", "2500"])
    assert cfg.method.beta == 2500.0 and any("1/2" in note for note in notes)
    with pytest.raises(UserError, match="beta = strong"):
        parse([*BASE, "--beta_dpo", "strong", "--compat", "hf-sd15"])


@pytest.mark.parametrize(
    ("flags", "peer", "warmup", "said"),
    [
        ([], "hf-sd15", 0, False),
        (["--lr_warmup_steps", "90"], "hf-sd15", 0, True),
        (["--lr_scheduler", "cosine"], "hf-sdxl", 500, False),
        (["--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "90"], "hf-sdxl", 90, False),
        ([], "sf", 500, False),
        (["--lr_scheduler", "constant"], "sf", 0, False),
        (["--lr_scheduler", "constant", "--lr_warmup_steps", "90"], None, 90, True),
    ],
)
def test_warm_up_as_those_scripts_do_it(flags, peer, warmup, said):
    cfg, notes = parse([*BASE, *flags, *(["--compat", peer] if peer else [])])
    assert cfg.optim.warmup == warmup
    assert any("warm" in note for note in notes if not note.startswith("their flags here")) == said


def test_salesforce_turbo_is_known_by_its_name_and_sdxl_by_its_flag():
    cfg, _ = parse(["--compat", "sf", "--model", "x/sdxl-turbo", "--data", "d", "--sdxl", "--resolution", "512"])
    assert (cfg.model.timesteps, cfg.data.resolution, cfg.optim.optimizer) == ("turbo", 512, "adafactor")


def test_validation_draws_images_when_asked():
    assert parse([*BASE, "--run_validation"])[0].output.sample_every == 200
    assert parse([*BASE, "--run_validation", "--validation_steps", "50"])[0].output.sample_every == 50
    assert parse([*BASE, "--run_validation", "--sample-every", "7"])[0].output.sample_every == 7
    cfg, notes = parse([*BASE, "--validation_steps", "50"])
    assert (cfg.output.validate_every, cfg.output.sample_every) == (50, 0) and any(
        "draws images" in note for note in notes
    )


def test_no_token_reaches_the_settings_or_the_log():
    cfg, notes = parse([*BASE, "--hub_token", "hf_secret"])
    assert "hf_secret" not in str(cfg) + str(notes)


def test_the_peers_are_told_apart_and_the_page_of_flags_is_current():
    assert set(PEERS) == {"hf-sd15", "hf-sdxl", "sf"}
    assert Path(__file__).parents[3].joinpath("docs", "flags.md").read_text() == flags_page()
    assert all(f"`--{name}`" in flags_page() for name in PEER_FLAGS if name not in specs())


def test_rank_without_lora_is_judged_by_all_settings(tmp_path):
    def said(*flags):
        return "--rank is for --lora" in " ".join(parse(list(flags))[1])

    def resumed(name, lora):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.toml").write_text(f"[lora]\nlora = {lora}\n")
        return said("--output", str(tmp_path / name), "--resume", "latest", "--rank", "4")

    assert not resumed("adapter", "true") and resumed("whole", "false")
    assert not said("--preset", "sd15-lora", "--rank", "4") and said("--preset", "sd15", "--rank", "4")


def test_what_each_flag_of_a_peer_became_is_said_once_as_it_was_typed():
    words = [
        "--train_batch_size",
        "2",
        "--beta_dpo",
        "2500",
        "--use_8bit_adam",
        "--mixed_precision",
        "no",
        "--seed",
        "3",
    ]
    _, notes = parse([*BASE, *words, "--compat", "hf-sd15"])
    (line,) = [note for note in notes if note.startswith("their flags here")]
    for said in (
        "--train_batch_size 2 is batch_size 2",
        "--beta_dpo 2500 is beta 5000",
        "--use_8bit_adam is optimizer adamw8bit",
        "--mixed_precision no is precision fp32",
    ):
        assert said in line
    assert "--seed" not in line, "it has that name here too"
    assert not [
        note for note in parse(["--model", "m", "--data", "d", "--seed", "3"])[1] if note.startswith("their flags here")
    ]
