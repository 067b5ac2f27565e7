"""dpo.drawing.images: a set in a folder. What is broken or foreign is drawn again in whole groups; the rest stays."""

import json
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image, PngImagePlugin

from dpo.common.errors import UserError
from dpo.common.pictures import pixel_hash
from dpo.drawing import images
from dpo.drawing.images import draw_set, merge, place, read_protocol, read_set
from dpo.drawing.render import Rendered, Task
from tests.help.drawing import files, protocol, said

CPU = torch.device("cpu")
TASKS = [Task(n, f"prompt {n // 2}", 1000 + n, number=n % 2, category="c") for n in range(7)]


@pytest.fixture
def drawer(monkeypatch):
    """Draws without a model: an image is noise by its seed; the fixture is the list of groups that were drawn."""
    groups = []

    def render(pipe, tasks, protocol, layouts):
        groups.append([task.index for task in tasks])
        return [Rendered(picture(task), "flat" if task.index == 3 else "") for task in tasks]

    class Still:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def seconds(self):
            return 0.0

    monkeypatch.setattr(images, "render", render)
    monkeypatch.setattr(images, "ready", lambda *_: Still())
    return groups


def picture(task, side=16):
    return Image.fromarray(np.random.default_rng(task.seed).integers(0, 256, (side, side, 3), dtype=np.uint8))


def draw(folder, tasks=TASKS, shard=(0, 1), **changes):
    return draw_set(None, tasks, protocol(**changes), folder, device=CPU, shard=shard)


def test_what_a_set_holds(tmp_path, drawer):
    pace = draw(tmp_path)
    assert (pace.done, pace.total, pace.drawn) == (7, 7, 7) and drawer == [[0, 1], [2, 3], [4, 5], [6]]
    found = read_set(tmp_path)
    assert [(one.prompt, one.seed, one.index, one.category) for one in found] == [
        (task.prompt, task.seed, task.index, "c") for task in TASKS
    ]
    assert found[0].hash == pixel_hash(picture(TASKS[0]))
    assert images.faults(found) == [f"1 of 7 images is flat: {found[3].path.name}"]
    assert read_protocol(tmp_path) == (protocol(), 7)
    chunk = said(found[2].path)
    assert chunk["prompt"] == "prompt 1" and chunk["protocol"] == protocol().hash and chunk["seed"] == 1002


def test_the_pixels_hash_does_not_depend_on_the_file(tmp_path):
    image = picture(TASKS[0])
    image.save(tmp_path / "a.png", compress_level=0)
    image.convert("RGBA").save(tmp_path / "b.png")
    assert {pixel_hash(Image.open(tmp_path / name)) for name in ("a.png", "b.png")} == {pixel_hash(image)}
    assert pixel_hash(image.resize((8, 32))) != pixel_hash(image.resize((32, 8)))


def cut(path):
    path.write_bytes(path.read_bytes()[:-40])


def flipped(path):
    data = bytearray(path.read_bytes())
    data[len(data) - 30] ^= 1
    path.write_bytes(data)


def empty(path):
    path.write_bytes(b"")


def text(path):
    path.write_text("not an image", "utf-8")


def foreign(path):
    picture(TASKS[0]).save(path)


def repainted(path):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("dpo", json.dumps(said(path)))
    picture(TASKS[0]).save(path, pnginfo=info)


def gone(path):
    path.unlink()


def anothers(path):
    path.write_bytes((path.parent / place(path.parents[1], TASKS[0], protocol()).name).read_bytes())


def rewritten(path, **changes):
    info = PngImagePlugin.PngInfo()
    info.add_itxt("dpo", json.dumps({**said(path), **changes}))
    with Image.open(path) as image:
        image.load()
    image.save(path, pnginfo=info)


def retold(path):
    rewritten(path, prompt=["a list"])


def renumbered(path):
    rewritten(path, index={"5": 5})


def half_told(path):
    rewritten(path, prompt="half \ud800")


@pytest.mark.parametrize(
    "spoil", [cut, flipped, empty, text, foreign, repainted, gone, anothers, retold, renumbered, half_told]
)
def test_a_broken_image_makes_its_group_drawn_again(tmp_path, drawer, spoil):
    draw(tmp_path)
    whole = files(tmp_path)
    drawer.clear()
    assert draw(tmp_path).drawn == 0 and drawer == []
    path = place(tmp_path, TASKS[5], protocol())
    spoil(path)
    assert files(tmp_path) != whole
    with pytest.raises(UserError, match="1 of 7 images is missing or broken, the first is 5"):
        read_set(tmp_path)
    assert draw(tmp_path).drawn == 2 and drawer == [[4, 5]]
    assert files(tmp_path) == whole


def test_what_a_kill_left_is_swept_and_what_is_the_users_stays(tmp_path, drawer):
    draw(tmp_path)
    whole = files(tmp_path)
    left = place(tmp_path, TASKS[1], protocol())
    (left.parent / f".{left.name}.part-123").write_bytes(b"half")
    draw(tmp_path)
    assert files(tmp_path) == whole
    (left.parent / "mine.png").write_bytes(b"mine")
    (left.parent / ".mine.png.part-1").write_bytes(b"mine")
    draw(tmp_path)
    assert len(read_set(tmp_path)) == 7 and len(files(tmp_path)) == len(whole) + 2


def test_images_of_another_protocol_are_not_mixed(tmp_path, drawer):
    draw(tmp_path)
    with pytest.raises(UserError, match=r"another protocol \(steps: 2 there, 3 now, and guidance\): name another"):
        draw(tmp_path, steps=3, guidance=1.0)


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"protocol": {}, "hash": "x", "images": 1}', "[" * 100_000])
def test_a_damaged_protocol_is_one_line(tmp_path, content):
    (tmp_path / "protocol.json").write_text(content, "utf-8")
    with pytest.raises(UserError, match=r"protocol.json cannot be read \(.*name another folder"):
        read_set(tmp_path)


def test_a_changed_protocol_is_noticed(tmp_path, drawer):
    draw(tmp_path)
    path = tmp_path / "protocol.json"
    path.write_text(path.read_text("utf-8").replace('"steps": 2', '"steps": 9'), "utf-8")
    with pytest.raises(UserError, match="it was changed"):
        read_set(tmp_path)


@pytest.mark.parametrize(
    ("count", "told"),
    [("-1", "it was changed"), ("true", "it was changed"), (str(10**15), "missing or broken, the first is 7")],
)
def test_a_changed_count_is_noticed_at_once(tmp_path, drawer, count, told):
    draw(tmp_path)
    path = tmp_path / "protocol.json"
    path.write_text(path.read_text("utf-8").replace('"images": 7', f'"images": {count}'), "utf-8")
    with pytest.raises(UserError, match=told):
        read_set(tmp_path)
    with pytest.raises(UserError, match=r"protocol\.json"):
        draw(tmp_path)


def test_no_set_and_no_more_than_a_part_of_one(tmp_path, drawer):
    with pytest.raises(UserError, match=r"python -m dpo\.sample"):
        read_set(tmp_path)
    draw(tmp_path, shard=(0, 2))
    assert not images.complete(tmp_path)
    with pytest.raises(UserError, match="3 of 7 images are missing"):
        read_set(tmp_path)


def test_numbers_of_seven_digits_are_counted_whole(tmp_path, drawer):
    draw(tmp_path)
    for path in (tmp_path / "images").glob("*.png"):
        path.rename(path.with_name(f"1{path.name}"))
    assert images.complete(tmp_path)


def test_shards_give_the_same_set_in_one_folder_or_merged(tmp_path, drawer):
    draw(tmp_path / "whole")
    for part in range(3):
        draw(tmp_path / "one", shard=(part, 3))
        draw(tmp_path / f"part{part}", shard=(part, 3))
    assert images.complete(tmp_path / "one")
    assert files(tmp_path / "one") == files(tmp_path / "whole")
    assert merge(tmp_path / "merged", [tmp_path / f"part{part}" for part in range(3)]) == 7
    assert files(tmp_path / "merged") == files(tmp_path / "whole")
    draw(tmp_path / "other", steps=9)
    assert merge(tmp_path / "merged", [tmp_path / "part0", tmp_path / "one"]) == 7  # what two parts have counts once
    with pytest.raises(UserError, match="part0 and .*other were drawn by different protocols .steps: 2 and 9"):
        merge(tmp_path / "new", [tmp_path / "part0", tmp_path / "other"])
    assert not (tmp_path / "new").exists()
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="--merge .*file: holds no images"):
        merge(tmp_path / "merged", [tmp_path / "file"])
    with pytest.raises(UserError, match="another protocol"):
        merge(tmp_path / "merged", [tmp_path / "other"])
    with pytest.raises(UserError, match="--merge"):
        merge(tmp_path / "merged", [tmp_path / "nowhere"])


HOSTILE = [
    "<script>alert(1)</script>", "../../etc/passwd", "a\\b:c*?", "x" * 10_000, "🦊" * 50, "\u202eright to left", "a\0b",
    "line\nbreak\r\n", "{braces} %s", "'; drop table --",
]  # fmt: skip


def test_no_prompt_reaches_a_files_name_and_each_is_read_back(tmp_path, drawer):
    draw(tmp_path, [Task(n, prompt, n) for n, prompt in enumerate(HOSTILE)])
    found = read_set(tmp_path)
    assert [one.prompt for one in found] == HOSTILE
    import re

    assert all(re.fullmatch(r"\d{6}-[0-9a-f]{8}\.png", one.path.name) for one in found)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "protocol.json"]


def test_the_chunk_is_plain_json(tmp_path, drawer):
    draw(tmp_path, [Task(0, "🦊\0", 5)])
    with Image.open(read_set(tmp_path)[0].path) as image:
        text = image.text["dpo"]
    assert text.isascii() and json.loads(text)["prompt"] == "🦊\0"


def peak(folder, count):
    tasks = [Task(n, "p", n) for n in range(count)]
    tracemalloc.start()
    try:
        draw(folder, tasks)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.long
def test_memory_does_not_grow_with_the_images(tmp_path, drawer, monkeypatch):
    monkeypatch.setattr(f"{__name__}.picture", lambda task, side=128, old=picture: old(task, side))
    few, many = peak(tmp_path / "few", 20), peak(tmp_path / "many", 200)
    assert many - few < 180 * 128 * 128 * 3 / 20  # a twentieth of what the further images take
