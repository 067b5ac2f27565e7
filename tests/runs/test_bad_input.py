"""Bad input: exit code 2 and one line that says what is wrong and what to do; nothing half-written is left behind."""

import errno
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors import SafetensorError

import dpo.models.load
import dpo.train
from dpo.common.errors import UserError
from dpo.settings.flags import parse
from dpo.training import checkpoint
from tests.help.commands import check_refused, command, tree
from tests.help.worlds import make_pickapic

STEP = "checkpoints/step-{:08d}"
OF_A_RUN = '[method]\nmethod = "dpo"\n[output]\ncheckpoint_every = 1\n'


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def damaged(folder: Path) -> Path:
    """A run whose only checkpoint is torn."""
    write(folder / "config.toml", OF_A_RUN)
    return write(folder / "checkpoints/step-00000001/state.json", "{").parents[2]


def parquet(path: Path, **columns: list) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


# --- refused before any weight is loaded: name -> (flags from the folder, words of the message)

COMMAND_LINE = {
    "unknown flag": (lambda at: ["--learning-rat", "1"], ["--learning-rat", "did you mean --learning-rate?"]),
    "stray word": (lambda at: ["stray"], ["'stray'", "every value follows a flag"]),
    "bad number": (lambda at: ["--steps", "0"], ["steps = 0", "at least 1"]),
    "not a number": (lambda at: ["--beta", "much"], ["beta = much", "a number"]),
    "first word of a flag": (lambda at: ["--batch", "4"], ["unknown flag --batch", "did you mean --batch-size?"]),
    "bad word": (lambda at: ["--method", "dp"], ["method = dp", "did you mean dpo?"]),
    "bad combination": (lambda at: ["--window-low", "900", "--window-high", "100"], ["window_low", "below", "window_high"]),
    "two starting points": (lambda at: ["--preset", "sd15", "--config", "c.toml"], ["--preset", "--config", "give one"]),
    "unknown preset": (lambda at: ["--preset", "sd16"], ["--preset sd16", "sd15"]),
    "unknown peer": (lambda at: ["--compat", "kohya"], ["--compat kohya", "hf-sd15"]),
    "a flag that makes no sense": (lambda at: ["--noise_offset", "0.1"], ["--noise_offset", "leave it out"]),
    "malformed config": (lambda at: ["--config", write(at / "c.toml", "steps = = 3")], ["c.toml", "not TOML", "line 1"]),
    "missing config": (lambda at: ["--config", at / "c.toml"], ["c.toml", "No such file"]),
    "unknown setting": (lambda at: ["--config", write(at / "c.toml", "stepz = 3")], ["stepz", "did you mean steps?"]),
    "no such prompts": (lambda at: ["--sample-prompts", at / "p.txt"], ["--sample-prompts", "p.txt", "one prompt a line"]),
    "empty prompts": (lambda at: ["--sample-prompts", write(at / "p.txt", "\n \n")], ["--sample-prompts", "has no prompt"]),
}  # fmt: skip
MODEL = {
    "no such model": (lambda at: ["--model", at / "nowhere"], ["no such model", "nowhere", "hub id"]),
    "not a pipeline": (lambda at: ["--model", write(at / "m/unet/x").parents[1]], ["no model_index.json", "whole diffusers"]),
    "damaged index": (lambda at: ["--model", write(at / "m/model_index.json", "{").parent], ["model_index.json", "fetch"]),
    "unknown family": (
        lambda at: ["--model", write(at / "m/model_index.json", '{"_class_name": "SanaPipeline"}').parent],
        ["unknown model family 'SanaPipeline'", "StableDiffusionXLPipeline"],
    ),
    "another family": (lambda at: ["--family", "sdxl"], ["of family sd", "--family sd"]),
    "not reachable": (lambda at: ["--model", "nobody/no-model"], ["nobody/no-model", "from the hub", "name a local folder"]),
    "pickled": (lambda at: ["--model", write(at / "m.ckpt", "x")], ["m.ckpt", "not a .safetensors file", "convert"]),
    "no such VAE": (lambda at: ["--vae", at / "nowhere"], ["--vae", "nowhere"]),
    "no such LoRA to start from": (lambda at: ["--lora", "--lora-init", at / "nowhere"], ["--lora-init", "nowhere"]),
    "a pickled LoRA": (lambda at: ["--lora-init", write(at / "l.bin", "x")], ["l.bin", "not a .safetensors file", "convert"]),
    "a pickled VAE": (lambda at: ["--vae", write(at / "v.pt", "x")], ["--vae", "v.pt", "not a .safetensors file"]),
    "no such start": (lambda at: ["--unet-init", at / "nowhere"], ["--unet-init", "nowhere"]),
}  # fmt: skip
DATA = {
    "no such data": (lambda at: ["--data", at / "nowhere"], ["nowhere", "no such file or folder"]),
    "not reachable": (lambda at: ["--data", "nobody/no-such-pairs"], ["nobody/no-such-pairs", "from the hub", "local folder"]),
    "missing columns": (
        lambda at: ["--data", parquet(at / "p.parquet", caption=["a"], picture=[b"x"])],
        ["p.parquet", "jpg_0", "found caption, picture", "--caption-column"],
    ),
    "no usable pairs": (lambda at: ["--data", make_pickapic(at / "p", 0, ties=3)], ["no usable pairs", "3 ties", "--ties keep"]),
    "no such split": (lambda at: ["--split", "test"], ["no split 'test'", "train", "--split"]),
    "not parquet": (lambda at: ["--data", write(at / "p.parquet", "x" * 99)], ["p.parquet", "cannot be read as parquet"]),
    "nothing held out": (lambda at: ["--validation-fraction", "0.0001"], ["--validation-fraction", "leaves none for validation"]),
}  # fmt: skip
OUTPUT = {
    "a file": (lambda at: ["--output", write(at / "f")], ["--output", "f is a file"]),
    "below a file": (lambda at: ["--output", write(at / "f") / "below"], ["--output", "f is a file"]),
    "another run": (
        lambda at: ["--output", write(at / "o/config.toml", OF_A_RUN).parent],
        ["holds another run", "--resume latest", "--overwrite"],
    ),
    "the model itself": (
        lambda at: ["--model", write(at / "m/model_index.json", "{}").parent, "--output", at / "m", "--overwrite"],
        ["folder of the model itself"],
    ),
    "resume of nothing": (lambda at: ["--resume", at / "nowhere"], ["no such checkpoint", "nowhere", "--resume latest"]),
    "resume and overwrite": (lambda at: ["--resume", "latest", "--overwrite"], ["--resume", "--overwrite", "give one"]),
    "damaged checkpoints": (
        lambda at: ["--output", damaged(at / "o"), "--resume", "latest"],
        ["no checkpoint can be read", "state.json", "--overwrite"],
    ),
}  # fmt: skip
EARLY = {
    f"{group}, {name}": case
    for group, cases in {"command": COMMAND_LINE, "model": MODEL, "data": DATA, "output": OUTPUT}.items()
    for name, case in cases.items()
}


@pytest.mark.parametrize("case", EARLY.values(), ids=EARLY)
def test_refused_before_weights_are_loaded(start, tmp_path, capsys, monkeypatch, case):
    def loaded(*args, **kwargs):
        raise AssertionError("weights are being loaded")

    monkeypatch.setattr(dpo.models.load, "component", loaded)
    flags, words = case
    flags = flags(tmp_path)
    before = tree(tmp_path)
    check_refused(command(capsys, *start, *flags), words)
    assert tree(tmp_path) == before


def test_a_folder_that_cannot_be_written_is_refused_at_once(start, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.access", lambda path, mode: False)  # the superuser may write everywhere
    check_refused(command(capsys, *start), ["--output", "not writable", "choose another"])


def test_a_gpu_that_is_not_there(start, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    check_refused(command(capsys, *start, "--device", "cuda"), ["--device cuda", "--device cpu"])


def test_as_a_program(world, tmp_path):
    words = [
        "--model",
        world("sd15"),
        "--data",
        world("pairs"),
        "--output",
        str(tmp_path / "out"),
        "--learning-rat",
        "1",
    ]
    ended = subprocess.run([sys.executable, "-m", "dpo.train", *words], capture_output=True, text=True)
    assert ended.returncode == 2 and ended.stdout == ""
    assert ended.stderr == "dpo.train: unknown flag --learning-rat: did you mean --learning-rate?\n"
    assert list(tmp_path.iterdir()) == []


# --- refused after weights were loaded


def pickled_model(world, at):
    folder = Path(shutil.copytree(world("sd15"), at / "m"))
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    return ["--model", folder]


def truncated_model(world, at):
    folder = Path(shutil.copytree(world("sd15"), at / "m"))
    weights = next((folder / "unet").glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:5000])
    return ["--model", folder]


def one_file(pipeline: str, part: str) -> Path:
    return next(Path(pipeline, part).glob("*.safetensors"))


LATE = {
    "no timestep left": (lambda world, at: ["--timesteps", "turbo", "--window-high", "100"], ["no usable timestep", "--window"]),
    "no such block": (lambda world, at: ["--checkpointing", "up_blocks.7"], ["up_blocks.7", "down_blocks.0"]),
    "no such variant": (lambda world, at: ["--variant", "fp16"], ["cannot load variant fp16", "leave out --variant"]),
    "pickled weights": (pickled_model, ["cannot load", "only safetensors are read"]),
    "truncated weights": (truncated_model, ["cannot load", "unet", "fetch the model again"]),
    "another UNet": (lambda world, at: ["--unet-init", Path(world("sdxl"), "unet")], ["--unet-init", "another architecture"]),
    "another network's file": (lambda world, at: ["--vae", one_file(world("sd15"), "unet")], ["--vae", "model's VAE"]),
    "no LoRA": (lambda world, at: ["--lora-init", one_file(world("sd15"), "vae")], ["--lora-init", "no LoRA of the UNet"]),
}  # fmt: skip


@pytest.mark.parametrize("case", LATE.values(), ids=LATE)
def test_refused_once_the_model_is_known(world, start, tmp_path, capsys, case):
    flags, words = case
    flags = flags(world, tmp_path)
    before = tree(tmp_path)
    check_refused(command(capsys, *start, *flags), words)
    assert tree(tmp_path) == before


# --- checkpoints


@pytest.mark.long
def test_a_damaged_checkpoint_falls_back_and_others_are_refused(world, stopped, tmp_path, capsys):
    out = tmp_path / "out"
    before = tree(out)
    again = [*stopped, "--resume", "latest"]
    check_refused(command(capsys, *again, "--model", world("sd2v")), ["cannot resume", "prediction_type"])
    other = Path(shutil.copytree(world("sd15"), tmp_path / "other"))
    shutil.copytree(altered_unet(other), other / "unet", dirs_exist_ok=True)
    check_refused(command(capsys, *again, "--model", other), ["trained from another model"])
    check_refused(
        command(capsys, *again, "--seed", "7", "--flip"), ["cannot resume", "seed 0 -> 7", "flip False -> True"]
    )
    assert tree(out) == before, "a refused resume changes nothing"

    last, middle = (out / STEP.format(step) / "policy.safetensors" for step in (3, 2))
    last.write_bytes(last.read_bytes()[:-100])
    content = bytearray(middle.read_bytes())
    content[-1] ^= 1
    middle.write_bytes(bytes(content))
    said = command(capsys, *again)
    assert said.code == 0
    assert [line for line in said.warnings("truncated or altered") if "trying the one before" in line].__len__() == 2
    assert any(f"resumed {out / STEP.format(1)}: 1 update done" in line for line in said.log)
    assert checkpoint.load(out / STEP.format(3)).state["step"] == 3


def altered_unet(model: Path) -> Path:
    """The UNet of a pipeline with one changed weight, in a folder of its own."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(model / "unet")
    with torch.no_grad():
        unet.conv_in.weight.add_(1.0)
    unet.save_pretrained(model.parent / "altered")
    return model.parent / "altered"


@pytest.mark.long
def test_resume_takes_the_folder_of_a_run_too(stopped, tmp_path, capsys):
    said = command(capsys, "--resume", shutil.move(tmp_path / "out", tmp_path / "moved to ü"), "--steps", "4")
    assert said.code == 0 and any("resumed" in line and "3 updates done" in line for line in said.log)
    assert (tmp_path / "moved to ü" / STEP.format(4)).is_dir() and not (tmp_path / "out").exists()


# --- images


@pytest.mark.long
def test_an_unreadable_image_stops_the_run_when_asked(start, tmp_path, capsys, brief):
    pairs = make_pickapic(tmp_path / "broken", 3, broken=("truncated",))
    said = command(capsys, *start, "--data", pairs, "--steps", "4", "--on-bad-image", "stop")
    check_refused(said, ["cannot be decoded", "--on-bad-image skip"])
    assert command(capsys, *start, "--data", pairs, "--steps", "4", "--resume", "latest").code == 0


@pytest.mark.long
def test_unreadable_images_are_skipped_and_counted_up_to_a_limit(start, tmp_path, capsys, brief):
    pairs = make_pickapic(tmp_path / "broken", 3, broken=("truncated", "bomb", "corrupt"))
    said = command(capsys, *start, "--data", pairs, "--steps", "4")
    assert said.code == 0
    left_out = said.warnings("pair left out")
    assert len(left_out) == 3, "each is told once"
    assert [line for line in left_out if "14000 x 14000 pixels" in line or "too many pixels" in line], (
        "the decompression bomb"
    )
    said = command(capsys, *start, "--data", pairs, "--steps", "4", "--overwrite", "--bad-image-limit", "0")
    check_refused(said, ["of 6 pairs have an unreadable image", "--bad-image-limit"])


@pytest.mark.long
def test_a_run_without_a_usable_pair_says_so(start, tmp_path, capsys, brief):
    pairs = make_pickapic(tmp_path / "broken", 0, broken=("corrupt", "empty"))
    said = command(capsys, *start, "--data", pairs, "--steps", "2", "--bad-image-limit", "1")
    check_refused(said, ["no pair could be used", "nothing was trained", "--data"])
    assert len(said.warnings("pair left out")) == 2
    figures = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    assert [line["pairs"] for line in figures if "loss" in line] == [0, 0]
    assert not (tmp_path / "out" / "checkpoints").exists() and not (tmp_path / "out" / "config.toml").exists()
    mended = make_pickapic(tmp_path / "mended", 3)
    assert command(capsys, *start, "--data", mended, "--steps", "1").code == 0, "the folder is free for other pairs"


# --- the surroundings


@pytest.mark.parametrize("name", ["WORLD_SIZE", "RANK"])
def test_an_environment_that_says_nonsense(name, monkeypatch):
    from dpo.common.command import shard_of

    monkeypatch.setenv(name, "abc")
    with pytest.raises(UserError, match=f"the environment has {name}=abc, which is no number"):
        shard_of(None)


def test_a_store_on_a_file_and_a_name_that_is_too_long(tmp_path, world, capsys):
    (tmp_path / "file").touch()
    flags = ["--model", world("sd15"), "--data", world("pairs"), "--workers", "0"]
    check_refused(command(capsys, "--output", tmp_path / ("x" * 300)), ["--output", "too long", "name another folder"])
    with pytest.raises(UserError, match=r"--store .*file: a file is there; name a folder"):
        from dpo.training import preparing

        preparing.encode_pairs(parse(flags)[0], tmp_path / "file", text_batch=4)


def test_a_tokenizer_that_does_not_say_how_long_a_caption_is(tmp_path, world):
    model = Path(shutil.copytree(world("sd15"), tmp_path / "model"))
    (model / "tokenizer" / "tokenizer_config.json").unlink()
    with pytest.raises(UserError, match="tokenizer does not say how long a caption may be"):
        dpo.models.load.load(str(model))


@pytest.mark.parametrize("length", ["77", [77], {"a": 1}, 0, -1, True, 2.5])
def test_a_tokenizer_whose_length_is_no_number_of_tokens(tmp_path, world, length):
    model = Path(shutil.copytree(world("sd15"), tmp_path / "model"))
    path = model / "tokenizer" / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | {"model_max_length": length}), "utf-8")
    with pytest.raises(UserError, match="tokenizer does not say how long a caption may be") as caught:
        dpo.models.load.load(str(model))
    assert "\n" not in str(caught.value)


def test_a_limit_on_the_size_of_files_is_said(tmp_path):
    from dpo.common.files import disk_error

    for error in (OSError(errno.EFBIG, "File too large"), SafetensorError("I/O error: File too large (os error 27)")):
        found = disk_error(error, tmp_path / "x")
        assert isinstance(found, UserError) and "may not grow so large here" in str(found)
