"""dpo.common.files: a file is there whole or not at all, a seal notices what was altered, a full disk is one line."""

import errno
import fcntl
import json
import os
import shutil
import stat
import time
from pathlib import Path

import pytest
from safetensors import SafetensorError

from dpo.common import files
from dpo.common.errors import UserError


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def no_space(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_new_file_lies_hidden_beside_its_place_until_it_is_whole(tmp_path):
    path = tmp_path / "grid.png"
    path.write_text("old")

    def write(part):
        assert part.parent == tmp_path and part.name.startswith(".grid.png.part-")
        part.write_text("new")
        assert path.read_text() == "old"

    files.write_whole(path, write)
    assert path.read_text() == "new" and names(tmp_path) == ["grid.png"]


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    target, path = tmp_path / "key", tmp_path / "config.toml"
    target.write_text("mine")
    path.symlink_to(target)
    files.write_text(path, "new")
    assert target.read_text() == "mine" and path.read_text() == "new" and not path.is_symlink()


def test_a_hidden_name_is_no_one_elses(tmp_path, monkeypatch):
    """Nobody can put a link there beforehand: it cannot be guessed, and where it is taken nothing is written."""
    names_of_two = {files.beside(tmp_path / "x").name for _ in range(2)}
    assert len(names_of_two) == 2 and not any(str(os.getpid()) == name.rpartition("-")[2] for name in names_of_two)
    target = tmp_path / "key"
    target.write_text("mine")
    monkeypatch.setattr(files, "beside", lambda path: tmp_path / "guessed")
    (tmp_path / "guessed").symlink_to(target)
    with pytest.raises(FileExistsError):
        files.write_whole(tmp_path / "x", lambda part: part.write_text("new"))
    with pytest.raises(FileExistsError):
        files.follow_umask(tmp_path)
    assert target.read_text() == "mine"


def test_what_killed_processes_left_is_swept(tmp_path):
    for name in (".a.part-7", ".a.part-0f", ".b.part-7", "a", ".a"):
        (tmp_path / name).write_text("x")
    (tmp_path / ".a.part-8").mkdir()
    (tmp_path / ".a.part-8" / "inner").write_text("x")
    (tmp_path / ".a.part-9").symlink_to(tmp_path / "a")
    files.sweep(tmp_path, "a")
    assert names(tmp_path) == [".a", ".b.part-7", "a"]


def test_it_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    done, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda descriptor: (done.append("flushed"), fsync(descriptor)))
    monkeypatch.setattr(os, "replace", lambda source, target: (done.append("renamed"), replace(source, target)))
    files.write_text(tmp_path / "config.toml", "new")
    assert done == ["flushed", "renamed"]


@pytest.mark.parametrize("error", [ValueError("no such format"), OSError(errno.EIO, "I/O error"), KeyboardInterrupt()])
@pytest.mark.parametrize("old", [None, "old"])
def test_a_write_that_fails_leaves_what_was_there_and_passes_the_error_on(tmp_path, error, old):
    path = tmp_path / "grid.png"
    if old is not None:
        path.write_text(old)

    def half(part):
        part.write_text("half of it")
        raise error

    with pytest.raises(type(error)) as caught:
        files.write_whole(path, half)
    assert caught.value is error
    assert names(tmp_path) == ([] if old is None else ["grid.png"])
    assert old is None or path.read_text() == old


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_text_on_a_full_disk_is_one_line(tmp_path, monkeypatch, call):
    path = tmp_path / "config.toml"
    files.write_text(path, "old ä")
    with monkeypatch.context() as patch:
        patch.setattr(os, call, no_space)
        with pytest.raises(UserError) as caught:
            files.write_text(path, "new")
    assert path.read_text(encoding="utf-8") == "old ä" and names(tmp_path) == ["config.toml"]
    begin, end = f"GiB left at {tmp_path}): ", "free some space, then go on with --resume latest"
    assert str(caught.value).startswith("the disk is full (") and str(caught.value).endswith(begin + end)


FULL = (
    OSError(errno.ENOSPC, "No space left on device"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
)


@pytest.mark.parametrize("error", FULL)
def test_the_line_for_a_full_disk_ends_in_what_to_do(tmp_path, error):
    said = files.disk_full(error, tmp_path / "000000.safetensors", "run it again")
    assert str(said).endswith(f"GiB left at {tmp_path}): free some space, then run it again") and "\n" not in str(said)
    assert "--resume latest" in str(files.disk_error(error, tmp_path / "x"))


def test_other_errors_of_the_disk(tmp_path):
    assert files.disk_full(OSError(errno.EIO, "I/O error"), tmp_path / "x", "run it again") is None
    said = files.disk_error(PermissionError(errno.EACCES, "Permission denied"), tmp_path / "x")
    assert str(said) == f"cannot write {tmp_path / 'x'}: Permission denied; choose another --output"
    unknown = OSError(errno.EIO, "I/O error")
    assert files.disk_error(unknown, tmp_path / "x") is unknown
    wrapped = files.disk_error(SafetensorError("header too large"), tmp_path / "x")
    assert isinstance(wrapped, OSError) and "header too large" in str(wrapped)


def test_a_checksum_is_that_of_the_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 2)  # several blocks, the last one short
    (tmp_path / "x").write_bytes(b"abc")
    assert files.checksum(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


# --- seals ----------------------------------------------------------------------------------------------------------------

CONTENT = {"format": 1, "step": 3, "x": [0.1, 1e-300, 2**63, None, True, "ä"], "by": {"3": {"a": 1}, "b": 2.5}}


@pytest.mark.parametrize("key", ["seal", "checksum"])
def test_what_is_sealed_comes_back(key):
    text = files.sealed(CONTENT, key)
    assert list(json.loads(text)) == [*CONTENT, key]
    assert files.unseal(text, key) == (CONTENT, True)


def test_what_json_writes_differently_passes_its_own_seal():
    found, unaltered = files.unseal(files.sealed({"betas": (0.9, 0.999), "by": {"3": 1, 4: 2}}, "seal"), "seal")
    assert unaltered and found == {"betas": [0.9, 0.999], "by": {"3": 1, "4": 2}}


GOLDEN = Path(__file__).parents[2] / "golden" / "v0.1"


@pytest.mark.parametrize("name, key", [("state.json", "seal"), ("store.json", "checksum"), ("record.json", "checksum")])
def test_files_of_version_0_1_are_read_and_would_be_written_again_to_the_byte(name, key):
    (path,) = GOLDEN.rglob(name)
    text = path.read_text(encoding="utf-8")
    content, unaltered = files.unseal(text, key)
    assert unaltered and files.sealed(content, key) == text


@pytest.mark.parametrize(
    "old, new", [('"step": 3', '"step": 4'), ("2.5", "2.50001"), ("true", "false"), ('"b"', '"c"')]
)
def test_an_altered_value_is_noticed(old, new):
    text = files.sealed(CONTENT, "seal")
    assert old in text
    content, unaltered = files.unseal(text.replace(old, new), "seal")
    assert not unaltered and "seal" not in content


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", "{}", '{"checksum": 1}'])
def test_what_has_no_seal_is_refused(text):
    with pytest.raises(ValueError):
        files.unseal(text, "seal")


# --- other systems --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["open", "fsync"])
@pytest.mark.parametrize(("number", "goes_on"), [(errno.EINVAL, True), (errno.EACCES, True), (errno.EIO, False)])
def test_a_system_that_does_not_flush_folders_is_no_reason_to_stop(tmp_path, monkeypatch, call, number, goes_on):
    """CIFS and WSL answer EINVAL, Windows opens no folders; an error of the disk is one."""

    def refused(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, refused)
    if goes_on:
        files.sync_folder(tmp_path)
    else:
        with pytest.raises(OSError, match=os.strerror(number)):
            files.sync_folder(tmp_path)


def test_a_file_is_flushed_by_a_descriptor_that_may_write(tmp_path, monkeypatch):
    """Windows refuses to flush one that may only read."""
    modes, fsync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: (modes.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_RDWR), fsync(fd)))
    files.write_text(tmp_path / "config.toml", "new")
    assert modes == [os.O_RDWR]


@pytest.mark.parametrize(("refusals", "replaced"), [(3, True), (9, False)])
def test_a_file_that_another_program_has_open_is_replaced_a_moment_later(tmp_path, monkeypatch, refusals, replaced):
    waits, left, replace = [], [refusals], os.replace

    def held(source, target):
        if left[0]:
            left[0] -= 1
            error = PermissionError(errno.EACCES, "used by another process")
            error.winerror = 32
            raise error
        replace(source, target)

    monkeypatch.setattr(os, "replace", held)
    monkeypatch.setattr(time, "sleep", waits.append)
    (tmp_path / "old").write_text("old")
    (tmp_path / "new").write_text("new")
    if replaced:
        files.replace(tmp_path / "new", tmp_path / "old")
        assert (tmp_path / "old").read_text() == "new" and len(waits) == 3
    else:
        with pytest.raises(PermissionError):
            files.replace(tmp_path / "new", tmp_path / "old")
        assert 0.5 < sum(waits) < 2


def test_elsewhere_a_refusal_is_final(tmp_path, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: pytest.fail("waited"))
    with pytest.raises(FileNotFoundError):
        files.replace(tmp_path / "none", tmp_path / "old")


def test_lines_end_alike_on_every_system(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "linesep", "\r\n")
    files.write_text(tmp_path / "a.csv", "x\ny\n")
    assert (tmp_path / "a.csv").read_bytes() == b"x\ny\n"


def test_a_folder_that_cannot_be_deleted_costs_a_warning(tmp_path, monkeypatch, caplog):
    """NFS keeps a file that is open somewhere, under another name, and its folder with it."""
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / ".nfs0001").write_text("")

    def busy(path, *_, **__):
        raise OSError(errno.EBUSY, "Device or resource busy")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", busy)
        files.discard(tmp_path / "step")
    assert "step is not needed any more and cannot be deleted (Device or resource busy)" in caplog.text
    assert not (tmp_path / "step").exists() and names(tmp_path)[0].startswith(".step.part-")
    (tmp_path / "link").symlink_to(tmp_path)
    files.discard(tmp_path / "link")
    assert tmp_path.is_dir() and not (tmp_path / "link").is_symlink()
    files.discard(tmp_path / "never there")
    assert "never there" in caplog.text


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_permissions_are_those_of_a_new_file(tmp_path, umask):
    before = os.umask(umask)
    try:
        path, inner = tmp_path / "weights", tmp_path / "unet" / "weights"
        files.write_whole(path, lambda part: (part.write_text("x"), part.chmod(0o600)))
        inner.parent.mkdir()
        inner.write_text("x")
        inner.chmod(0o600)
        files.follow_umask(tmp_path)
    finally:
        os.umask(before)
    assert {oct(stat.S_IMODE(file.stat().st_mode)) for file in (path, inner)} == {oct(0o666 & ~umask)}
    assert names(tmp_path) == ["unet", "weights"]


@pytest.mark.parametrize(
    ("text", "there"),
    [(".", True), ("nowhere", False), ("x" * 300, False), ("a\0b", False), ("~nobody-at-all/x", False)],
)
def test_a_word_that_can_be_no_path_is_not_there(text, there):
    assert files.is_there(text) == there


def test_folders_that_were_made_go_while_they_are_empty(tmp_path):
    (tmp_path / "mine").mkdir()
    for folder in (tmp_path / "mine", tmp_path / "mine/deep/out"):
        with pytest.raises(UserError, match="refused"), files.made(folder, "--output"):
            assert folder.is_dir()
            raise UserError("refused")
    assert names(tmp_path) == ["mine"] and names(tmp_path / "mine") == []
    with files.made(tmp_path / "a/b", "--output"):
        (tmp_path / "a/kept.txt").write_text("x")
    assert names(tmp_path / "a") == ["kept.txt"]
    with pytest.raises(UserError, match="--output .*: a file is there; name a folder"):
        files.made(tmp_path / "a/kept.txt", "--output").__enter__()
