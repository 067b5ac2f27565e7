"""dpo.training.folder: which folders a run may use, and what --overwrite clears in one; the list is
pages/folder.ENTRIES.
"""

import tempfile
from pathlib import Path

import pytest

from dpo import prepare
from dpo.common import files
from dpo.common.errors import UserError
from dpo.pages.folder import ENTRIES
from dpo.settings.config import Config, change, to_toml
from dpo.training import folder
from dpo.training.folder import check_output, clear_output

FOLDERS = {entry.name for entry in ENTRIES if entry.folder}
EARLY = ("metrics.jsonl", "samples", "tensorboard", "wandb", "wandb_id.txt")
STARTED = '{"event": "started", "step": 0, "total": 9, "device": "CPU"}\n'
SETTINGS = to_toml(Config())


def put(folder, *names):
    """These entries in `folder`, each as the file or folder that it is, of somebody else's."""
    folder.mkdir(exist_ok=True)
    for name in names:
        if name in FOLDERS:
            (folder / name / "inner").mkdir(parents=True)
        else:
            (folder / name).write_text("x")


def into(folder, **settings):
    return change(Config(), output=str(folder), **settings)


def mark(folder, kind):
    """Makes the folder a run of this trainer."""
    if kind == "config.toml":
        (folder / kind).write_text(SETTINGS)
    else:
        (folder / "checkpoints" / "step-00000002").mkdir(parents=True)
        (folder / "checkpoints" / "step-00000002" / "state.json").write_text('{"format": 1}')


@pytest.mark.parametrize("kind", ["config.toml", "checkpoints"])
def test_a_folder_with_a_run_is_kept_unless_told_otherwise(tmp_path, kind):
    put(tmp_path, *(entry.name for entry in ENTRIES if entry.name not in ("config.toml", "checkpoints")))
    mark(tmp_path, kind)
    with pytest.raises(UserError, match="holds another run: go on with it"):
        check_output(into(tmp_path))
    assert check_output(into(tmp_path, resume="latest")) == check_output(into(tmp_path, overwrite=True)) == tmp_path


def test_a_run_is_not_gone_on_with_into_the_folder_of_another(tmp_path):
    """Its result would be replaced, and one file of metrics would have the lines of both."""
    own, other = tmp_path / "own", tmp_path / "other"
    for place in (own, other):
        place.mkdir()
        mark(place, "checkpoints")
    for named in (other, other / "checkpoints", other / "checkpoints" / "step-00000002"):
        with pytest.raises(
            UserError, match=f"holds another run than --resume {named}: go on with it .--resume latest., or"
        ):
            check_output(into(own, resume=str(named)))
        assert check_output(into(tmp_path / "new", resume=str(named))) == tmp_path / "new"
    aside = own / "checkpoints" / "abandoned-1" / "step-00000001"
    for named in (own, own / "checkpoints", own / "checkpoints" / "step-00000002", aside):
        assert check_output(into(own, resume=str(named))) == own
    (own / "checkpoints").rename(tmp_path / "disk")
    (own / "checkpoints").symlink_to(tmp_path / "disk")
    for named in (own / "checkpoints" / "step-00000002", tmp_path / "disk" / "step-00000002"):
        assert check_output(into(own, resume=str(named))) == own


@pytest.mark.parametrize("resume", [None, "latest"])
@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES if entry.name != "failed.txt"])
def test_nothing_of_somebody_elses_is_written_over(tmp_path, name, resume):
    """Every name that a run writes; also where a copied command line resumes whatever is there."""
    put(tmp_path, name, "notes.txt")
    with pytest.raises(UserError, match=f"is no run and has {name}, which would be replaced: name another --output"):
        check_output(into(tmp_path, resume=resume))
    assert check_output(into(tmp_path, overwrite=True)) == tmp_path
    (tmp_path / "other" / "out").mkdir(parents=True)
    for entry in tmp_path.iterdir():
        (tmp_path / "other" / "out" / entry.name).symlink_to(tmp_path / "nowhere" if entry.is_file() else entry)
    with pytest.raises(UserError, match="is no run and has"):
        check_output(into(tmp_path / "other" / "out"))


MARKS_OF_OTHERS = {
    "config.toml": "[model]\nname = 1\n[method]\nmethod = 'other'\n",
    "checkpoints/step-00000002/state.json": '{"step": 2}',
    "checkpoints/checkpoint-500/state.json": '{"format": 1}',
    "metrics.jsonl": '{"step": 1, "loss": 0.5}\n',
}


@pytest.mark.parametrize("name", MARKS_OF_OTHERS)
def test_others_have_files_of_these_names_too(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(MARKS_OF_OTHERS[name])
    put(tmp_path, "vae")
    with pytest.raises(UserError, match=f"is no run and has {name.split('/')[0]}, vae"):
        check_output(into(tmp_path, resume="latest"))


@pytest.mark.parametrize("lines", ["", STARTED, STARTED + '{"step": 1, "loss": 0.7}\n'])
@pytest.mark.parametrize("resume", [None, "latest"])
def test_an_early_interrupted_start_is_no_obstacle(tmp_path, lines, resume):
    put(tmp_path, *EARLY)
    (tmp_path / "metrics.jsonl").write_text(lines)
    assert check_output(into(tmp_path, resume=resume)) == tmp_path
    put(tmp_path, "unet")
    with pytest.raises(UserError, match="is no run and has unet,"):
        check_output(into(tmp_path, resume=resume))


def test_what_harms_nobody_is_no_obstacle(tmp_path):
    """Other files, the note of a sweep whose run never started, and empty folders, made for the run, links too."""
    put(tmp_path, "failed.txt", "notes.txt")
    (tmp_path / "unet").mkdir()
    (tmp_path / "disk" / "far").mkdir(parents=True)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "disk" / "far")
    assert check_output(into(tmp_path)) == tmp_path


@pytest.mark.parametrize("overwrite", [True, False])
def test_what_cannot_be_written_is_said_at_the_start(tmp_path, overwrite):
    config = into(tmp_path, overwrite=overwrite)
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match="checkpoints is a link to a folder that is not there: make that"):
        check_output(config)
    (tmp_path / "checkpoints").unlink()
    (tmp_path / "README.md").mkdir()
    with pytest.raises(UserError, match=r"README\.md is a folder where a run writes a file"):
        check_output(config)


# What a run puts into its folders, and what of a user's may lie beside it there.
INSIDE = {
    "evaluation": "evaluation.html",
    "checkpoints": "step-00000002",
    "samples": "step-00000002.png",
    "tensorboard": "events.out.tfevents.1",
    "wandb": "run-1",
    "scheduler": "scheduler_config.json",
    "tokenizer": "vocab.json",
    "tokenizer_2": "merges.txt",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "text_encoder_3": "model.safetensors",
    "tokenizer_3": "tokenizer.json",
    "transformer": "diffusion_pytorch_model.safetensors",
    "unet": "diffusion_pytorch_model-00001-of-00002.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}
OWN = (
    "notes.txt", "samples/mine.png", "samples/step-7.png", "samples/before/key.png", "checkpoints/best/policy.safetensors",
    "checkpoints/step-500/policy.safetensors",
    "evaluation/notes.txt", "evaluation/images/aligned/images/mine.jpg", "tensorboard/other.txt", "unet/thesis.pdf", "wandb/settings",
)  # fmt: skip


def everything(folder):
    """All that a run of any kind leaves."""
    put(folder, *(entry.name for entry in ENTRIES))
    (folder / "config.toml").write_text(SETTINGS)
    for name in FOLDERS:
        (folder / name / "inner").rmdir()
        (folder / name / INSIDE[name]).write_text("x")
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


def test_overwriting_keeps_links_to_folders_and_empties_them(tmp_path):
    """The old checkpoints would be resumed otherwise, or the link to a larger disk be gone."""
    out, disk = tmp_path / "out", tmp_path / "disk"
    everything(out)
    disk.mkdir()
    for name in FOLDERS:
        (out / name).rename(disk / name)
        (disk / name / "mine").write_text("mine")
        (out / name).symlink_to(disk / name)
    (out / "summary.json").unlink()
    (out / "summary.json").symlink_to(tmp_path / "key")
    (tmp_path / "key").write_text("mine")
    clear_output(out, into(out, overwrite=True).output)
    assert {path.name for path in out.iterdir()} == FOLDERS and all(path.is_symlink() for path in out.iterdir())
    assert paths(disk) == {f"{name}/mine" for name in FOLDERS} and (tmp_path / "key").read_text() == "mine"


def test_overwriting_deletes_no_parts_that_no_run_wrote(tmp_path, caplog):
    """Beside a LoRA a unet/ is the user's; of a model without a run nothing goes before the result replaces it."""
    lora, own = tmp_path / "lora", tmp_path / "own"
    put(lora, "pytorch_lora_weights.safetensors", "unet", "vae")
    mark(lora, "config.toml")
    clear_output(lora, into(lora, overwrite=True).output)
    assert {path.name for path in lora.iterdir()} == {"unet", "vae"} and not caplog.messages
    put(own, "model_index.json", "unet", "README.md", "failed.txt", "notes.txt")
    clear_output(own, into(own, overwrite=True).output)
    assert {path.name for path in own.iterdir()} == {"model_index.json", "unet", "failed.txt", "notes.txt"}
    (said,) = caplog.messages
    assert said == (
        f"--overwrite: no run wrote README.md, model_index.json, unet in {own}; what this one writes replaces them"
    )


def test_a_kill_while_overwriting_leaves_a_run_that_can_be_overwritten(tmp_path, monkeypatch):
    everything(tmp_path)
    left = [5]

    def killed(path):
        left[0] -= 1
        if not left[0]:
            raise KeyboardInterrupt
        files.remove(path)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(folder, "remove", killed)
        clear_output(tmp_path, into(tmp_path, overwrite=True).output)
    with pytest.raises(UserError, match="holds another run"):
        check_output(into(tmp_path))


def test_what_killed_processes_left_is_cleared(tmp_path):
    """Whatever its name says of the process; what merely looks like it is the user's."""
    for name in (".config.toml.part-7", ".result.part-0f", ".unet.part-a", ".notes.part-7"):
        (tmp_path / name).mkdir()
    clear_output(tmp_path, into(tmp_path).output)
    assert [path.name for path in tmp_path.iterdir()] == [".notes.part-7"]


def test_the_folder_is_made_when_it_is_not_there(tmp_path):
    clear_output(tmp_path / "a" / "b", into(tmp_path, overwrite=True).output)
    assert (tmp_path / "a" / "b").is_dir()


def test_names_are_listed_once():
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)
    assert all(bool(entry.inside) == entry.folder for entry in ENTRIES)


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
    put(out, "unet", "vae", "pytorch_lora_weights.safetensors")
    mark(out, "config.toml")
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
    (tmp_path / "in" / "out").mkdir(parents=True)
    mark(tmp_path / "in" / "out", "checkpoints")
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
    with pytest.raises(UserError, match=r"out: .*cannot be made \(Read-only file system\); name another folder"):
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
