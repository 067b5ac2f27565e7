"""dpo.export: the command's words, exit codes and where it says the file belongs."""

import re

import pytest
from safetensors.torch import load_file

from dpo import export
from dpo.common.errors import UserError
from dpo.exporting import asked, sources, spec
from dpo.settings.config import Config, change, to_toml
from tests.help.handed import lora_run


@pytest.fixture
def said(capsys):
    """The command: exit code, stdout, stderr."""

    def say(*words):
        capsys.readouterr()
        code = export.main([str(word) for word in words])
        return code, *capsys.readouterr()

    return say


def test_a_run_becomes_a_file_named_after_it(world, said, tmp_path, monkeypatch):
    lora_run(tmp_path / "runs" / "mine", world("sd15"))
    code, out, err = said(tmp_path / "runs" / "mine", "--to", "comfyui")
    assert (code, out) == (0, f"{tmp_path / 'runs' / 'mine.safetensors'}\n")
    assert "of the size of no published model" in err and "config=FOLDER" not in err, "which is for whole models"
    assert all(name.startswith("lora_unet_") for name in load_file(tmp_path / "runs" / "mine.safetensors"))
    monkeypatch.setattr(spec, "architecture", lambda known: "stable-diffusion-v1")
    code, _, err = said(tmp_path / "runs" / "mine", "--to", "a1111", "--output", tmp_path)
    assert code == 0 and "put the file into stable-diffusion-webui/models/Lora" in err
    assert (tmp_path / "mine.safetensors").is_file()
    code, out, _ = said(tmp_path / "runs" / "mine", "--to", "comfyui", "--output", tmp_path / "new" / "folder")
    assert (code, out) == (0, f"{tmp_path / 'new' / 'folder' / 'mine.safetensors'}\n")


@pytest.mark.parametrize("begun", [True, False])
def test_a_run_that_is_not_finished_has_no_result(said, tmp_path, begun):
    run = tmp_path / "run"
    (run / "checkpoints/step-00000004").mkdir(parents=True)
    (run / "config.toml").write_text(to_toml(change(Config(), lora=True)), encoding="utf-8")
    if begun:
        (run / "checkpoints/step-00000004/state.json").write_text("{}", encoding="utf-8")
    then = "start it again with --resume latest" if begun else "it has no checkpoint, so start it again"
    words = f"{run} holds a run that is not finished, and so no result: {then}\n"
    assert said(run, "--to", "comfyui") == (2, "", f"dpo.export: {words}")
    with pytest.raises(UserError, match=re.escape(words.strip())):
        sources.opened(str(run), None)


def test_mistakes_cost_one_line(world, said):
    code, out, err = said(world("sd15"), "--to", "single-file", "--merge")
    assert code == 2 and out == "" and err.splitlines()[-1].startswith("dpo.export: --merge folds a LoRA into its base")
    code, _, err = said(world("sd15"), "--to", "photoshop")
    assert code == 2 and len(err.splitlines()) == 1 and "invalid choice: 'photoshop'" in err


def test_every_target_is_explained(said, capsys):
    with pytest.raises(SystemExit):
        said("--help")
    shown = capsys.readouterr().out
    assert all(f"--to {target}" in shown for target in asked.TARGETS)
