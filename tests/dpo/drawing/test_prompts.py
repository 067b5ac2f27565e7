"""dpo.drawing.prompts: texts, files, public sets from disk and hub, and a subset that does not depend on the order."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dpo.common.errors import UserError
from dpo.drawing.prompts import NAMES, PUBLISHED, Prompt, PromptSet, class_prompts, opened
from dpo.sample import make_parser
from tests.help.originals import original

TEXTS = ["a red fox", 'quotes "and", commas', "ünï 🦊"]


def table(folder, kind):
    path = folder / f"p.{kind}"
    rows = [{"prompt": text, "category": f"c{n}", "n": n} for n, text in enumerate(TEXTS)]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist([{**row, "image": b"png"} for row in rows]), path)
    elif kind == "json":
        path.write_text(json.dumps(rows), "utf-8")
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, rows)), "utf-8")
    else:
        import csv

        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]), delimiter="\t" if kind == "tsv" else ",")
            writer.writeheader()
            writer.writerows(rows)
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_a_table_gives_prompts_and_categories(tmp_path, kind):
    found = opened([str(table(tmp_path, kind))])
    assert [(one.text, one.category) for one in found.prompts] == [(text, f"c{n}") for n, text in enumerate(TEXTS)]
    assert found.about == {**PromptSet("x", found.prompts).about, "name": f"p.{kind}"}
    assert [one.text for one in opened([str(table(tmp_path, kind))], "category").prompts] == ["c0", "c1", "c2"]


def test_texts_files_of_lines_and_folders_of_files(tmp_path):
    (tmp_path / "p.txt").write_text("one\n\n two \n", "utf-8")
    assert [one.text for one in opened([str(tmp_path / "p.txt")]).prompts] == ["one", "two"]
    (tmp_path / "dpg").mkdir()
    for name in ("b", "a"):
        (tmp_path / "dpg" / f"{name}.txt").write_text(f"the {name}\n", "utf-8")
    assert [one.text for one in opened([str(tmp_path / "dpg")]).prompts] == ["the a", "the b"]
    assert [one.name for one in opened([str(tmp_path / "dpg")]).prompts] == ["a", "b"]
    assert [one.text for one in opened(["a fox", "<b>a/../boat.png</b> "]).prompts] == [
        "a fox",
        "<b>a/../boat.png</b> ",
    ]
    assert opened(["x" * 10_000]).prompts[0].text == "x" * 10_000
    assert opened(["a sign that says hello.txt"]).prompts[0].text == "a sign that says hello.txt"


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("p.jsonl", b'{"prompt": "a"}\n\n{"prompt"', ["p.jsonl", "cannot be read", "line 3:"]),
        ("p.jsonl", b'{"prompt": "a", "seed": 2.5}', ["row 1", "seed", "2.5"]),
        ("p.jsonl", b'{"prompt": "a", "seed": true}', ["row 1", "seed", "True"]),
        ("p.csv", b"prompt,seed\na,-1", ["row 1", "0 to 2^32 - 1", "'-1'"]),
        ("p.csv", b"prompt,seed\na,1e30", ["row 1", "seed"]),
        ("p.csv", b"prompt,seed\na,4294967296", ["row 1", "seed"]),
        ("p.csv", b"prompt,category\na\na fox, red,animal", ["row 2 has more cells than the header", "quotes"]),
        ("p.jsonl", b'{"prompt": 3}', ["row 1", "needs text"]),
        ("p.jsonl", b"7", ["row 1", "found int"]),
        ("p.jsonl", b'{"words": "a"}', ["'prompt'", "words", "--prompt-column"]),
        ("p.jsonl", b'{"prompt": "\\ud800"}', ["half a character"]),
        ("p.jsonl", b'{"prompt": "a", "seed": "x"}', ["seed", "whole number"]),
        ("p.json", b"{}", ["cannot be read", "no list"]),
        ("p.json", b"[" * 100_000, ["cannot be read"]),
        ("p.txt", b"\xff\xfe\xff", ["cannot be read"]),
        ("p.txt", b"\n \n", ["no prompt"]),
        ("p.txt", b"x" * 100_001, ["100,001 characters"]),
        ("p.csv", b"", ["no prompt"]),
        ("p.parquet", b"PAR1 not", ["cannot be read"]),
        (None, b"", ["cannot be read", "none.csv"]),
    ],
)
def test_a_bad_file_is_one_line(tmp_path, name, content, words):
    path = tmp_path / (name or "none.csv")
    if name:
        path.write_bytes(content)
    with pytest.raises(UserError) as refused:
        opened([str(path)])
    assert [word for word in words if word not in str(refused.value)] == [] and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        (["FILE.md"], ["FILE.md", "another kind", ".jsonl"]),
        (["FILE.md", "a fox"], ["FILE.md", "one is taken at a time"]),
        (["not/there"], ["no such file or folder"]),
        (["a fox", "not-there.csv"], ["not-there.csv", "no such file"]),
        (["pickapic"], ["did you mean pickapic-v1-validation or "]),
        (["hpdv2"], ["did you mean hpsv2?"]),
        (["HPSv2"], ["did you mean hpsv2?"]),
        (["world:foo"], ["did you mean world or world:other?"]),
        (["a fox", "world:other"], ["is a set of prompts, which is taken alone"]),
        ([""], ["no prompt is there", "world:other"]),
    ],
)
def test_a_word_that_can_only_be_a_file_or_a_set_is_no_prompt(tmp_path, monkeypatch, asked, words):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "FILE.md").write_text("a fox", "utf-8")
    with pytest.raises(UserError) as refused:
        opened(asked, also=("world", "world:other"))
    assert [word for word in words if word not in str(refused.value)] == []
    assert [one.text for one in opened(["fox", "a FILE.md", "photo"], also=("world",)).prompts] == [
        "fox",
        "a FILE.md",
        "photo",
    ]


def test_a_column_of_what_is_no_table_is_refused(tmp_path):
    (tmp_path / "p.txt").write_text("one", "utf-8")
    for asked in (["a fox"], [str(tmp_path / "p.txt")]):
        with pytest.raises(UserError, match="--prompt-column zz is of a table"):
            opened(asked, "zz")


def test_a_subset_is_chosen_by_each_prompt_alone():
    prompts = tuple(Prompt(f"prompt {n}") for n in range(200))
    chosen = PromptSet("all", prompts).subset(20)
    assert len(chosen.prompts) == 20 and list(chosen.prompts) == sorted(chosen.prompts, key=prompts.index)
    assert set(PromptSet("all", prompts[::-1]).subset(20).prompts) == set(chosen.prompts)
    assert set(chosen.prompts) < set(PromptSet("all", prompts).subset(30).prompts)
    assert set(PromptSet("all", prompts).subset(20, 1).prompts) != set(chosen.prompts)
    with pytest.raises(UserError, match="has 200 prompts"):
        PromptSet("all", prompts).subset(201)


def test_public_sets_come_from_disk(tmp_path, caplog):
    for style in ("anime", "concept-art", "paintings", "photo"):
        (tmp_path / f"{style}.json").write_text(json.dumps([f"{style} {n}" for n in range(3)]), "utf-8")
    found = opened([f"hpsv2:{tmp_path}"])
    assert found.name == "HPSv2 benchmark" and len(found.prompts) == 12
    assert found.prompts[4] == Prompt("concept-art 1", "concept-art")
    assert "12 prompts, where 3200 are published" in caplog.text
    (tmp_path / "PartiPrompts.tsv").write_text('Prompt\tCategory\tChallenge\tNote\na "b" c\tArts\tBasic\t\n', "utf-8")
    assert opened([f"partiprompts:{tmp_path}"]).prompts[0][:2] == ('a "b" c', "Arts")
    rows = [{"caption": "x", "jpg_0": b"bytes"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "test_unique-00000-of-00001.parquet")
    assert [one.text for one in opened([f"pickapic-v1-test:{tmp_path}"]).prompts] == ["x"]
    with pytest.raises(UserError, match="validation_unique-"):
        opened([f"pickapic-v1-validation:{tmp_path}"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_a_network_a_public_set_is_one_line(name, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.HfFileSystem, "glob", lambda *_: 1 / 0)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError) as refused:
        opened([name])
    assert f"--prompts {name}:FOLDER" in str(refused.value) and "\n" not in str(refused.value)


def test_a_set_that_was_withdrawn_asks_for_ones_own_copy():
    with pytest.raises(
        UserError, match=r"was withdrawn from the hub; give your own copy: --prompts pickapic-v1-test:FOLDER"
    ):
        opened(["pickapic-v1-test"])


def test_the_classes_are_a_set_by_name_in_order_and_told_apart():
    found = opened(["imagenet-classes"])
    texts = [one.text for one in found.prompts]
    assert texts == class_prompts() and len(set(texts)) == 1000
    assert [texts[i] for i in (0, 134, 517, 638, 639, 999)] == [
        "A photo of tench", "A photo of bird crane", "A photo of machine crane",
        "A photo of maillot swimsuit", "A photo of maillot tanksuit", "A photo of toilet tissue",
    ]  # fmt: skip
    assert found.about["name"] == "ImageNet classes" and found.about["count"] == 1000
    with pytest.raises(UserError, match="imagenet-classes lies in the package and takes no place"):
        opened(["imagenet-classes:/folder"])
    with pytest.raises(UserError, match="imagenet-classes"):
        opened([""])


def test_the_names_of_the_classes_are_torchvisions_but_for_four():
    theirs = original("torchvision.models._meta")._IMAGENET_CATEGORIES
    different = [i for i, (ours, name) in enumerate(zip(class_prompts(), theirs)) if ours != f"A photo of {name}"]
    assert different == [134, 517, 638, 639]


def test_every_set_by_name_is_in_the_help_and_in_the_docs():
    help_text = "".join(make_parser().format_help().split())  # lines break at hyphens too
    docs = Path(__file__).parents[3].joinpath("docs", "sample.md").read_text("utf-8")
    assert [name for name in NAMES if name not in help_text or f"`{name}`" not in docs] == []
