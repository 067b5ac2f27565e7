"""The files of a folder: what is hidden, what links to where, and how the rest is counted."""

import os
from collections import Counter

import pytest

from dpo.common.errors import UserError
from dpo.data.listing import is_junk, list_files, not_read


@pytest.mark.parametrize(
    ("name", "junk"),
    [
        ("a/b.jpg", False),
        ("a/._b.jpg", True),
        (".git/x", True),
        ("a/.ipynb_checkpoints/b-checkpoint.jpg", True),
        ("THUMBS.DB", True),
        ("__MACOSX/a.jpg", True),
        ("a/@eaDir/b.jpg", True),
        ("thumbs.db.jpg", False),
    ],
)
def test_what_is_no_file_of_the_user(name, junk):
    assert is_junk(name) is junk


def test_a_folder_is_read_once_under_its_own_path(tmp_path):
    (tmp_path / "set" / "z").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    for place in ("set/z/a.jpg", "elsewhere/b.jpg"):
        (tmp_path / place).write_bytes(b"x")
    for name in ("a", "zz"):  # one sorts before the folder itself, one after it
        (tmp_path / "set" / name).symlink_to(tmp_path / "set" / "z")
    (tmp_path / "set" / "z" / "up").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "out").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "c.jpg").symlink_to(tmp_path / "elsewhere" / "b.jpg")
    (tmp_path / "set" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "set" / "self").symlink_to("self")
    found = list_files(tmp_path / "set")
    assert found.files == ["c.jpg", "out/b.jpg", "z/a.jpg"]
    assert found.passed_over == {"links that lead nowhere": 2}


def test_names_that_are_no_text_are_counted(tmp_path):
    try:
        (tmp_path / "\udcff.jpg").write_bytes(b"x")
    except OSError:
        pytest.skip("the file system has names of text only")
    assert list_files(tmp_path).passed_over == {"with a name that is not UTF-8": 1}


def test_files_that_are_not_read_are_counted_once_each():
    names = ["a.HEIC", "b.heic", "README", "x.of a long sentence", *(f"a.k{i}" for i in range(12))]
    counts = not_read(names, Counter({"hidden": 3}))
    assert counts["files not read: .heic"] == 2 and counts["files not read: hidden"] == 3
    assert sum(counts.values()) == len(names) + 3 and len(counts) <= 10


def test_a_folder_that_cannot_be_listed_is_counted_or_named(tmp_path, monkeypatch):
    (tmp_path / "closed").mkdir()
    (tmp_path / "a.jpg").write_bytes(b"x")
    scandir = os.scandir

    def refuse(folder):
        if folder.name == "closed":
            raise PermissionError(13, "Permission denied")
        return scandir(folder)

    monkeypatch.setattr(os, "scandir", refuse)
    found = list_files(tmp_path)
    assert found.files == ["a.jpg"] and found.passed_over == {"folders that cannot be listed": 1}
    with pytest.raises(UserError, match=r"closed: cannot be listed \(Permission denied\)"):
        list_files(tmp_path / "closed")
