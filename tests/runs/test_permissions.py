"""Everything that a run or a store writes follows the umask: others read it where the user lets them."""

import os
import stat

import pytest

from dpo import prepare
from tests.help.commands import command


@pytest.mark.parametrize("umask", [pytest.param(0o022, marks=pytest.mark.slow), 0o027])
def test_everything_written_follows_the_umask(start, world, tmp_path, capsys, umask):
    before = os.umask(umask)
    try:
        words = [*start, "--steps", "1", "--checkpoint-every", "1", "--tensorboard"]
        assert command(capsys, *words).code == 0
        store = ["--store", str(tmp_path / "store"), "--workers", "0"]
        assert prepare.main([*store, "--model", world("sd15"), "--data", world("pairs")]) == 0
    finally:
        os.umask(before)
    found = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    assert sum(path.suffix == ".safetensors" for path in found) >= 5
    wrong = [
        f"{path}: {mode:o}" for path, mode in found.items() if mode != (0o777 if path.is_dir() else 0o666) & ~umask
    ]
    assert wrong == []
