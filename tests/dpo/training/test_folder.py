"""dpo.training.folder: which folders a run may use, and what --overwrite clears in one; the list is
pages/folder.ENTRIES.
"""

import tempfile
from pathlib import Path

import pytest

from dpo import prepare
from dpo.common.errors import UserError
from dpo.pages.folder import ENTRIES
from dpo.settings.config import Config, change
from dpo.training.folder import check_output, clear_output
from dpo.training.results import NOT_UPLOADED

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


# What a run puts into its folders, and what of a user's may lie beside it there.
INSIDE = {"checkpoints": "step-00000002", "samples": "step-00000002.png", "tensorboard": "events.out.tfevents.1"}
OWN = ("notes.txt", "samples/mine.png", "checkpoints/best/policy.safetensors", "tensorboard/other.txt")


def everything(folder):
    """All that a run of any kind leaves."""
    put(folder, *(entry.name for entry in ENTRIES))
    for name in FOLDERS | {"tensorboard", "wandb"}:
        (folder / name / "inner").rmdir()
        (folder / name / INSIDE.get(name, "inner")).write_text("x")
    (folder / "samples" / "before").mkdir()
    (folder / "samples" / "before" / "000.png").write_text("x")


def paths(folder):
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_overwriting_clears_all_that_a_run_writes_and_nothing_else(tmp_path):
    everything(tmp_path)
    before = paths(tmp_path)
    for kept in (into(tmp_path), into(tmp_path, resume="latest")):
        clear_output(tmp_path, kept.output)
        assert paths(tmp_path) == before
    for name in OWN:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("mine")
    clear_output(tmp_path, into(tmp_path, overwrite=True).output)
    assert paths(tmp_path) == set(OWN)


def test_overwriting_leaves_no_empty_folders(tmp_path):
    everything(tmp_path)
    clear_output(tmp_path, into(tmp_path, overwrite=True).output)
    assert list(tmp_path.iterdir()) == []


def test_overwriting_deletes_no_parts_that_no_run_wrote(tmp_path):
    """Beside a LoRA a unet/ is the user's; a pipeline without a run is his whole."""
    lora, own = tmp_path / "lora", tmp_path / "own"
    for folder in (lora, own):
        folder.mkdir()
    put(lora, "config.toml", "pytorch_lora_weights.safetensors", "unet", "vae")
    clear_output(lora, into(lora, overwrite=True).output)
    assert {path.name for path in lora.iterdir()} == {"unet", "vae"}
    put(own, "model_index.json", "unet", "README.md")
    clear_output(own, into(own, overwrite=True).output)
    assert {path.name for path in own.iterdir()} == {"model_index.json", "unet", "README.md"}


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


@pytest.mark.parametrize("setting", ["model", "unet_init", "lora_init", "vae", "data", "validation_data"])
def test_a_run_does_not_write_into_what_it_reads(tmp_path, setting):
    source = tmp_path / "in"
    source.mkdir()
    flag = f"--{setting.replace('_', '-')}"
    named = {setting: str(source)}
    with pytest.raises(UserError, match=rf"out lies inside {flag} .*in, which is only read; name a folder beside it"):
        check_output(into(source / "deep" / "out", **named))
    with pytest.raises(UserError, match="which would be replaced; name another folder"):
        check_output(into(source, overwrite=True, **named))
    assert check_output(into(tmp_path / "out", **named)) == tmp_path / "out"
    (tmp_path / "link").symlink_to(source)
    with pytest.raises(UserError, match="lies inside"):
        check_output(into(tmp_path / "link" / "out", **named))


def test_a_run_that_lies_there_already_goes_on(tmp_path):
    (tmp_path / "in" / "out" / "checkpoints").mkdir(parents=True)
    config = into(tmp_path / "in" / "out", data=str(tmp_path / "in"), resume="latest")
    assert check_output(config) == tmp_path / "in" / "out"


@pytest.mark.parametrize("place", ["", "store"])
def test_a_store_is_not_made_in_what_it_is_made_from(tmp_path, capsys, place):
    """With the same folder nothing was done, and the exit code was 0."""
    words = ["--store", str(tmp_path / place), "--data", str(tmp_path), "--model", str(tmp_path / "model")]
    assert prepare.main(words) == 2
    said = capsys.readouterr().err.strip()
    assert "--data" in said and "name a" in said and len(said.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_found_before_anything_is_loaded(tmp_path, monkeypatch):
    """Permissions alone do not tell: the superuser has them all, and some file systems refuse whatever they say."""

    def refuse(self, *args, **options):
        raise OSError(30, "Read-only file system", str(self))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(UserError, match=r"out: .*cannot be made \(Read-only file system\); choose another folder"):
        check_output(into(tmp_path / "deep" / "out"))


def test_a_folder_that_takes_no_file_is_found_before_anything_is_loaded(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)
    with pytest.raises(UserError, match=r"takes no file \(No space left on device\); choose another folder"):
        check_output(into(tmp_path / "deep" / "out"))
    assert list(tmp_path.iterdir()) == [], "what was tried is gone again"


@pytest.mark.parametrize("there", ["", "deep", "deep/out"])
def test_trying_a_folder_leaves_nothing_behind(tmp_path, there):
    (tmp_path / there).mkdir(parents=True, exist_ok=True)
    before = sorted(tmp_path.rglob("*"))
    assert check_output(into(tmp_path / "deep" / "out")) == tmp_path / "deep" / "out"
    assert sorted(tmp_path.rglob("*")) == before
