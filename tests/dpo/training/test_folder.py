"""dpo.training.folder: which folders a run may use, and what --overwrite clears in one; the list is
pages/folder.ENTRIES.
"""

import pytest

from dpo.common.errors import UserError
from dpo.pages.folder import ENTRIES
from dpo.settings.config import Config, change
from dpo.training.folder import check_output, clear_output
from dpo.training.results import NOT_UPLOADED

CLEARED = {
    "config.toml", "checkpoints", "samples", "summary.json", "tables.json", "README.md", "report.html", "model_index.json",
    "pytorch_lora_weights.safetensors",
}  # fmt: skip
RUNS = ("config.toml", "checkpoints", "model_index.json")
GUARDED = ("README.md", "report.html", "unet", "vae", "text_encoder")
FOLDERS = {
    "checkpoints",
    "samples",
    "unet",
    "vae",
    "text_encoder",
    "text_encoder_2",
    "tokenizer",
    "tokenizer_2",
    "scheduler",
}


def put(folder, *names):
    """These entries of a run in `folder`, each as the file or folder that it is."""
    for name in names:
        if name in FOLDERS | {"tensorboard", "wandb"}:
            (folder / name / "inner").mkdir(parents=True)
        else:
            (folder / name).write_text("x")


def into(folder, **settings):
    return change(Config(), output=str(folder), **settings)


@pytest.mark.parametrize("name", RUNS)
def test_a_folder_with_a_run_is_kept_unless_told_otherwise(tmp_path, name):
    put(tmp_path, name, "README.md")
    with pytest.raises(UserError, match="holds another run: go on with it"):
        check_output(into(tmp_path))
    assert check_output(into(tmp_path, resume="latest")) == check_output(into(tmp_path, overwrite=True)) == tmp_path


def test_a_strangers_folder_is_not_written_into(tmp_path):
    put(tmp_path, *GUARDED, "metrics.jsonl", "curves.png", "tokenizer")
    with pytest.raises(
        UserError, match=r"is no run and has README\.md, report\.html, unet, vae, text_encoder, which would"
    ):
        check_output(into(tmp_path))
    assert check_output(into(tmp_path, overwrite=True)) == tmp_path


def test_files_that_harm_nobody_are_no_obstacle(tmp_path):
    put(tmp_path, *(entry.name for entry in ENTRIES if entry.name not in (*RUNS, *GUARDED)), "notes.txt")
    assert check_output(into(tmp_path)) == tmp_path


def test_overwriting_clears_what_could_be_taken_for_this_runs(tmp_path):
    names = {entry.name for entry in ENTRIES} | {"notes.txt"}
    put(tmp_path, *names)
    for kept in (into(tmp_path), into(tmp_path, resume="latest")):
        clear_output(tmp_path, kept.output)
        assert {path.name for path in tmp_path.iterdir()} == names
    clear_output(tmp_path, into(tmp_path, overwrite=True).output)
    assert {path.name for path in tmp_path.iterdir()} == names - CLEARED


def test_the_folder_is_made_when_it_is_not_there(tmp_path):
    clear_output(tmp_path / "a" / "b", into(tmp_path, overwrite=True).output)
    assert (tmp_path / "a" / "b").is_dir()


def test_the_hub_gets_no_checkpoints_and_no_tracker_files():
    assert NOT_UPLOADED == ["checkpoints/**", "tensorboard/**", "wandb/**", ".*"]


def test_folders_are_told_from_files():
    assert {entry.name for entry in ENTRIES if entry.folder} == FOLDERS | {"tensorboard", "wandb"}
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


@pytest.mark.parametrize(
    ("setting", "place"),
    [
        ("lora_init", ""),
        ("lora_init", "pytorch_lora_weights.safetensors"),
        ("unet_init", "unet"),
        ("unet_init", ""),
        ("unet_init", "unet/inner"),
        ("vae", "vae"),
    ],
)
def test_what_the_run_is_made_from_is_not_written_over(tmp_path, setting, place):
    """With --overwrite the LoRA of an SFT run would be deleted at the start."""
    out = tmp_path / "sft"
    out.mkdir()
    put(out, "config.toml", "unet", "vae", "pytorch_lora_weights.safetensors")
    config = change(Config(), output=str(out), overwrite=True, **{setting: str(out / place)})
    flag = f"--{setting.replace('_', '-')}"
    with pytest.raises(UserError, match=rf"sft has {flag} .* in it, which would be replaced; name another folder"):
        check_output(config)
    assert check_output(change(config, output=str(tmp_path / "dpo"))) == tmp_path / "dpo"
    (tmp_path / "style.safetensors").touch()
    check_output(change(config, output=str(tmp_path), **{setting: str(tmp_path / "style.safetensors")}))
