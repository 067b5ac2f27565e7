"""Every warning appears on a set that is made to have its fault, names the number and what to do, and not on a clean one."""

import json
from dataclasses import replace

import numpy as np
import pytest

from dpo.data.labels import BLANK
from dpo.data.pairs import InMemory
from dpo.data.sources import open_source
from dpo.pairing.look import Broken, Looked, Seen
from dpo.pairing.warn import FEW, MANY, Set, warnings
from dpo.settings.config import Data
from tests.help.worlds import make_table

RNG = np.random.default_rng(0)
NUMBERS = iter(range(10**6))


def image(size=(64, 64), pixels=None, small=None):
    small = RNG.integers(0, 256, (16, 16, 3), dtype=np.uint8) if small is None else small
    return Seen(*size, pixels or f"pixels {next(NUMBERS)}", small)


def pair(caption, win=None, lose=None):
    number = next(NUMBERS)
    return Looked(number, number, caption, (f"w{number}.png", f"l{number}.png"), win or image(), lose or image())


def a_set(pairs, blank=0):
    captions = len({one.caption for one in pairs})
    source = InMemory(pairs, np.ones(len(pairs)), {BLANK: blank}, "")
    return Set(source, Data(), pairs, captions, 64)


def clean(count=FEW):
    return [pair(f"a fox, number {number}") for number in range(count)]


def test_a_clean_set_has_no_warning():
    assert warnings(a_set(clean())) == []
    assert warnings(a_set([pair("x y " * 30 + str(i)) for i in range(FEW)])) == [], "61 or 62 pieces fit"


def circle():
    a, b, c = (image(pixels=name) for name in "abc")
    return [pair("round", a, b), pair("round", b, c), pair("round", c, a)]


def crowd():
    one = image(pixels="one")
    return [pair(f"crowd {number}", one) for number in range(MANY + 1)]


def twin():
    one = image()
    return pair("twins", one, image(small=np.clip(one.small.astype(int) + 2, 0, 255).astype(np.uint8)))


FAULTS = {
    "few": (clean(FEW - 1), "99 pairs are few"),
    "one": (clean(1), "1 pair is few"),
    "one caption": ([pair("a fox") for _ in range(FEW)], "all 100 pairs have one caption"),
    "portraits": ([*clean(), *(pair(f"p{i}", image((64, 96))) for i in range(10))],
                  "10 of 220 images are far from square and lose 33% of their area"),
    "small": ([*clean(), *(pair(f"s{i}", image((63, 64))) for i in range(10))],
              "10 of 220 images have a side below 64 pixels (the shortest 63) and would be enlarged"),
    "broken": ([*clean(), pair("x", Broken("not an image"))], "1 image cannot be read, the first: w"),
    "long": ([*clean(), pair("fox " * 76)], "1 of 101 captions is longer than the 77 tokens"),
    "digits": ([*clean(), pair("1" * 76)], "1 of 101 captions is longer"),
    "circle": ([*clean(), *circle()], "1 caption has images that beat each other in a circle, such as"),
    "both ways": ([*clean(), *circle()[:1], pair("round", image(pixels="b"), image(pixels="a"))], "1 caption has images"),
    "crowd": ([*clean(), *crowd()], "1 image is in more than 20 pairs each, the most in 21: w"),
    "alike": ([*clean(), twin()], "1 of 101 pairs has two images that are almost the same, the first: w"),
    "smaller": ([pair(f"c{i}", image((64, 64)), image((70, 70))) for i in range(FEW)],
                "the chosen image is the smaller one in 100 of 100 pairs"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_has_its_own_line_alone(fault):
    pairs, words = FAULTS[fault]
    lines = warnings(a_set(pairs))
    assert len(lines) == 1 and words in lines[0] and "\n" not in lines[0], lines


def test_captions_that_are_missing():
    (line,) = warnings(a_set(clean(), blank=7))
    assert line.startswith("7 of 100 pairs have no caption")
    (line,) = warnings(a_set(clean(), blank=1))
    assert line.startswith("1 of 100 pairs has no caption, and trains the empty prompt: give")
    (line,) = warnings(a_set([pair("") for _ in range(FEW)], blank=FEW))
    assert line.startswith("100 of 100 pairs have no caption"), "not that all have one caption"


def test_one_image_is_one_image():
    found = a_set([*clean(3), pair("p", image((32, 96)), image((40, 40)))])
    _, wide, small = warnings(found)
    assert wide.startswith("1 of 8 images is far from square and loses 67% of its area") and wide.endswith("its shape")
    assert small.startswith("2 of 8 images have a side below 64 pixels")


def test_a_few_odd_shapes_among_many_are_not_a_fault_of_the_set():
    assert warnings(a_set([*clean(), pair("p", image((32, 96)))])) == []


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((64, 96), ["--buckets keeps their shape"]),
        ((52, 78), ["--buckets keeps their shape", "--buckets keeps their area"]),
        ((40, 60), ["--buckets keeps their shape", "give larger ones"]),
    ],
)
def test_buckets_are_named_where_they_help(size, words):
    lines = warnings(a_set([*clean(), *(pair(f"p{i}", image(size)) for i in range(10))]))
    assert len(lines) == len(words) and all(word in line for word, line in zip(words, lines, strict=True)), lines


@pytest.mark.parametrize(
    ("label", "words"),
    [(1.0, "the first image is the preferred one in all 20"), (0.0, "the second image is"), (None, "")],
)
def test_a_column_of_labels_that_always_says_the_same(tmp_path, label, words):
    path = make_table(tmp_path, 20, size=(16, 16))
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{"prompt": r["prompt"], "image_0": r["chosen"], "image_1": r["rejected"]} for r in rows]
    rows = [{**row, "label_0": float(place % 2) if label is None else label} for place, row in enumerate(rows)]
    path.write_text("\n".join(map(json.dumps, rows)))
    data = Data(data=str(path))
    found = [line for line in warnings(Set(open_source(data), data, [], 20, 16)) if "few" not in line]
    assert len(found) == bool(words) and all(words in line for line in found)


def test_a_set_of_chosen_and_rejected_says_nothing_by_its_order(tmp_path):
    data = Data(data=str(make_table(tmp_path, 20, size=(16, 16))))
    found = replace(a_set(clean()), source=open_source(data), data=data)
    assert [line for line in warnings(found) if "few" not in line] == []
