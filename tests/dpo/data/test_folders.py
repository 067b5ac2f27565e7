"""Folders w/ and l/: partners, captions from many places, files that are no data, links."""

import shutil

import pytest

from dpo.common.errors import UserError
from dpo.data.sources import describe, open_source
from tests.dpo.data.test_parquet import is_bright
from tests.help import worlds


@pytest.mark.parametrize("captions_in", ["metadata", "captions", "txt"])
def test_folders(captions_in, tmp_path, settings):
    worlds.make_folders(tmp_path, 4, captions_in=captions_in)
    source = open_source(settings(tmp_path))
    pairs = [source[i] for i in range(4)]
    assert [p.caption for p in pairs] == [pair["caption"] for pair in worlds.make_pairs(4)]
    assert all(is_bright(p.win.load()) and not is_bright(p.lose.load()) for p in pairs)


def test_folders_without_captions_and_without_partners(tmp_path, settings):
    worlds.make_folders(tmp_path, 4, captions_in="none")
    (tmp_path / "l" / "00002.jpg").rename(tmp_path / "l" / "other.jpg")
    source = open_source(settings(tmp_path))
    assert len(source) == 3 and source[0].caption == ""
    assert describe(source) == "5 rows: 3 pairs, 3 without a caption; left out: 2 without a partner"


def test_folders_match_across_file_types_and_below(tmp_path, settings):
    worlds.make_folders(tmp_path, 2, captions_in="none")
    for side, kind in (("w", "png"), ("l", "jpeg")):
        (tmp_path / side / "more").mkdir()
        (tmp_path / side / "more" / f"picture.{kind}").write_bytes(side.encode())
    (tmp_path / "w" / "more" / "picture.txt").write_text("deep\n")
    source = open_source(settings(tmp_path))
    assert len(source) == 3 and source[2].win.uid == "w/more/picture.png" and source[2].caption == "deep"


def test_folder_of_a_split(tmp_path, settings):
    worlds.make_folders(tmp_path / "validation", 2)
    worlds.make_folders(tmp_path / "train", 3)
    assert len(open_source(settings(tmp_path))) == 3
    assert len(open_source(settings(tmp_path), "validation")) == 2


def test_empty_folders(tmp_path, settings):
    worlds.make_folders(tmp_path, 0)
    with pytest.raises(UserError, match="no usable pairs"):
        open_source(settings(tmp_path))


def test_metadata_without_names(tmp_path, settings):
    worlds.make_folders(tmp_path, 1)
    (tmp_path / "metadata.jsonl").write_text('{"file": "a.jpg"}\n')
    with pytest.raises(UserError, match=r"metadata.jsonl, line 1: needs file_name and caption, found file"):
        open_source(settings(tmp_path))


def test_fingerprints_and_keys_do_not_depend_on_the_place(tmp_path, settings):
    sources = []
    for name in ("a", "b"):
        worlds.make_folders(tmp_path / name, 3)
        sources.append(open_source(settings(tmp_path / name)))
    assert sources[0].fingerprint == sources[1].fingerprint
    assert [sources[0][i].key for i in range(3)] == [sources[1][i].key for i in range(3)]


CAPTIONS = [f"picture {i}" for i in range(3)]


def captions_of(source):
    return [source[i].caption for i in range(len(source))]


@pytest.mark.parametrize("place", ["metadata.csv", "w/metadata.csv", "l/metadata.jsonl", "w/METADATA.CSV"])
def test_captions_of_an_imagefolder(place, tmp_path, settings):
    worlds.make_folders(tmp_path, 3, captions_in="none")
    rows = [f"{i:05d}.jpg,{text}" for i, text in enumerate(CAPTIONS)]
    if place.endswith("jsonl"):
        rows = [f'{{"file_name": "{i:05d}.jpg", "text": "{text}"}}' for i, text in enumerate(CAPTIONS)]
    else:
        rows.insert(0, "\ufefffile_name,text")
    (tmp_path / place).write_text("\n".join(rows), encoding="utf-8")
    source = open_source(settings(tmp_path))
    assert captions_of(source) == CAPTIONS
    assert describe(source) == "3 rows: 3 pairs; 1 caption file"


@pytest.mark.parametrize("suffix", [".caption", ".CAPTION", ".TXT"])
def test_captions_beside_the_images(suffix, tmp_path, settings):
    worlds.make_folders(tmp_path, 3, captions_in="none")
    for i, text in enumerate(CAPTIONS):
        (tmp_path / ("w" if i else "l") / f"{i:05d}{suffix}").write_text(text + "\n")
    assert captions_of(open_source(settings(tmp_path))) == CAPTIONS


def test_metadata_of_folders_below_is_relative_to_them(tmp_path, settings):
    worlds.make_folders(tmp_path, 3, captions_in="none")
    for side in "wl":
        (tmp_path / side / "deep").mkdir()
        (tmp_path / side / "00001.jpg").rename(tmp_path / side / "deep" / "00001.jpg")
    (tmp_path / "w" / "deep" / "metadata.csv").write_text("file_name,caption\n00001.jpg,from below\n")
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "w/00002.jpg", "caption": null}\n')
    source = open_source(settings(tmp_path))
    assert captions_of(source) == ["", "", "from below"]
    assert describe(source) == "3 rows: 3 pairs, 2 without a caption; 2 caption files"


def test_twins_and_thumbnails_are_no_pairs(tmp_path, settings):
    worlds.make_folders(tmp_path, 3)
    before = open_source(settings(tmp_path))
    for side in "wl":
        for name in (".ipynb_checkpoints/00000-checkpoint.jpg", "._00000.jpg", "@eaDir/00000.jpg", ".hidden.png"):
            (tmp_path / side / name).parent.mkdir(exist_ok=True)
            shutil.copy(tmp_path / side / "00000.jpg", tmp_path / side / name)
        (tmp_path / side / "Thumbs.db").write_bytes(b"x")
    source = open_source(settings(tmp_path))
    assert source.fingerprint == before.fingerprint
    assert describe(source) == "3 rows: 3 pairs; 1 caption file; files not read: 10 hidden"


def test_linked_folders_are_read_and_loops_end(tmp_path, settings):
    worlds.make_folders(tmp_path / "real", 2, captions_in="txt")
    worlds.make_folders(tmp_path / "more", 2, seed=1, captions_in="txt")
    for side in "wl":
        (tmp_path / "set").mkdir(exist_ok=True)
        (tmp_path / "set" / side).symlink_to(tmp_path / "real" / side)
        (tmp_path / "real" / side / "more").symlink_to(tmp_path / "more" / side)
        (tmp_path / "more" / side / "round").symlink_to(tmp_path / "real")
    source = open_source(settings(tmp_path / "set"))
    assert [source[i].win.uid for i in range(4)] == [
        f"w/{name}.jpg" for name in ("00000", "00001", "more/00000", "more/00001")
    ]
    assert "without a caption" not in describe(source)


def test_an_image_of_the_same_name_is_a_partner_beside_one_of_another_extension(tmp_path, settings):
    worlds.make_folders(tmp_path, 3)
    shutil.copy(tmp_path / "w" / "00001.jpg", tmp_path / "w" / "00001.png")
    source = open_source(settings(tmp_path))
    assert source.summary["pairs"] == 3 and source.summary["without a partner"] == 1


def test_a_caption_that_is_not_utf8_is_named(tmp_path, settings):
    worlds.make_folders(tmp_path, 3, captions_in="txt")
    (tmp_path / "w" / "00001.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match=r"00001\.txt: not UTF-8 text"):
        open_source(settings(tmp_path))


def test_a_line_of_captions_without_a_tab_is_named(tmp_path, settings):
    """Blanks in the place of the tab once lost every caption in silence."""
    worlds.make_folders(tmp_path, 2, captions_in="none")
    (tmp_path / "captions.txt").write_text("00000.jpg\ta fox\n\n00001.jpg    two  foxes\n")
    with pytest.raises(
        UserError, match=r"captions.txt, line 3: has no tab: .* a tab .*, found '00001.jpg    two  foxes'"
    ):
        open_source(settings(tmp_path))
    (tmp_path / "captions.txt").write_bytes("00000.jpg\ta fox\u2028and more\r\n  \r\n00001.jpg\tb\r\n".encode())
    assert captions_of(open_source(settings(tmp_path))) == ["a fox\u2028and more", "b"]


@pytest.mark.parametrize("table", ["captions.txt", "l/captions.txt", "metadata.csv"])
def test_names_that_are_no_images_are_counted(table, tmp_path, settings, caplog):
    worlds.make_folders(tmp_path, 3, captions_in="none")
    (tmp_path / "l/00001.jpg").rename(tmp_path / "l/00001.png")
    (tmp_path / "l/00002.jpg").rename(tmp_path / "l/alone.jpg")
    form, head = ("{},{}\n", "file_name,caption\n") if table.endswith("csv") else ("{}\t{}\n", "")
    rows = [("00000.jpg", "a"), ("00001.png", "b"), ("alone", "no pair's"), ("1.jpg", "lost"), ("2.jpg", "lost")]
    (tmp_path / table).write_text(head + "".join(form.format(*row) for row in rows))
    assert captions_of(open_source(settings(tmp_path))) == ["a", "b"]
    (line,) = caplog.messages
    strange = "'l/1.jpg'" if table.startswith("l/") else "'1.jpg'"
    assert line == (
        f"{tmp_path / table}: 2 of 5 names are no image's, the first: {strange}; they are those of the files in w/ and l/"
    )
