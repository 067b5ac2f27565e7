"""The page of a replayed update, and its lines on the console: all figures, escaped, self-contained."""

import json

import pytest
from PIL import Image

from dpo.pages import replay
from tests.help.pages import Page

EVIL = '"><script>alert(1)</script>{{ 1 }}'


def pair(key, **changes):
    return {
        "key": str(key), "caption": "a fox", "dropped": False, "timestep": 720, "difference": -0.0027, "logit": 2.67,
        "loss": 0.067, "pull": 0.5, "prob": 1.0, "usable": True, "gradient_norm": 32.5, "cosine": 0.89, "share": 0.6,
        "measured": True, "images": {"win": "w/1.jpg", "lose": "l/1.jpg"}, **changes,
    }  # fmt: skip


def curve(name, *losses, **more):
    rows = [{"step": 4 + at, "loss": loss, "grad_norm": 2 * loss} for at, loss in enumerate(losses)]
    return {"name": name, "updates": rows, "heldout": None, "ended": None, **more}


def result(**changes):
    return {
        "format": 1, "run": "runs/my run", "update": 5, "from": {"step": 2, "checkpoint": "step-00000002", "updates": 3},
        "device": "CPU", "versions": {"torch": "2.13.0"}, "of_run": {"device": "CPU", "versions": {"torch": "2.13.0"}},
        "compared": {"updates": 3, "first": None}, "figures": {"loss": 0.5, "grad_norm": 3.0}, "ended": None,
        "share": "a share", "measured": 2, "pairs": [pair(-7), pair(8, share=0.4)], "window": [5, 5], "changes": {},
        "without": [], "curves": [curve("as it was", 0.7)], **changes,
    }  # fmt: skip


def pictures(count):
    return [Image.new("RGB", (16, 16), (9 * number, 0, 0)) for number in range(2 * count)]


def test_page_and_lines_have_every_figure_of_a_pair():
    found = result()
    text, page = replay.lines(found), Page(replay.render(found, pictures(2)))
    for shown in (text, page.text):
        for words in (
            "60.0%",
            "+0.89",
            "32.5",
            "0.067",
            "+2.67",
            "-0.0027",
            "720",
            "-7",
            "a fox",
            "bit for bit",
            "step-00000002",
        ):
            assert words in shown, words
    assert "w/1.jpg" in page.text and page.tags.count("img") == 4
    assert all(ref.startswith(("data:", "#")) for ref in page.refs) and "script" not in page.tags
    assert "python -m dpo.replay 'runs/my run' --update 5 --without -7" in page.text
    assert len({len(line) for line in text.splitlines() if "a fox" in line}) == 1, "columns"


def test_captions_and_places_are_text():
    found = result(pairs=[pair(1, caption=EVIL, images={"win": EVIL, "lose": "x"})])
    page = Page(replay.render(found, pictures(1)))
    assert "script" not in page.tags and page.text.count(EVIL) == 3
    assert replay.lines(result(pairs=[pair(1, caption="two\nlines " * 40)])).count("\n") < 6


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"compared": {"updates": 0, "first": None}}, ["metrics have none of these updates"]),
        (
            {
                "compared": {"updates": 3, "first": {"update": 4, "figure": "loss", "run": 0.5, "replay": 0.25}},
                "of_run": {"device": "H100", "versions": {"torch": "2.11.0", "gone": "1"}, "processes": 2},
            },
            [
                "differs from the run first at update 4: loss 0.5 there, 0.25 here",
                "H100 then, CPU now; 2 processes then, whose sums had another order; torch 2.11.0 then, 2.13.0 now",
            ],
        ),
        ({"from": {"step": 0, "checkpoint": None, "updates": 5}}, ["5 updates made again from the start of the run"]),
        ({"ended": "update 5 gives x", "figures": None}, ["As it was, update 5 gives x."]),
        ({"measured": 1}, ["The gradients of 1 of 2 pairs were measured", "those that pull most"]),
        ({"pairs": [pair(1, usable=False, measured=False, share=None)]}, ["unusable"]),
        ({"pairs": [pair(1, loss=None, share=None, gradient_norm=None)]}, ["not finite"]),
        ({"pairs": [pair(1, dropped=True, caption="")]}, ["(caption dropped)"]),
    ],
)  # fmt: skip
def test_what_is_not_as_usual_is_said(changes, words):
    found = result(**changes)
    page = Page(replay.render(found, pictures(len(found["pairs"]))))
    for word in words:
        assert word in replay.lines(found) and word in page.text
    if "measured" in changes:
        lone = replay.lines(
            result(pairs=[pair(1), pair(2, measured=False, share=None, cosine=None, gradient_norm=None)])
        )
        assert "not finite" not in lone


def test_both_curves_and_both_accuracies():
    held = {"heldout_accuracy": 0.61, "heldout_interval": [0.5, 0.7], "heldout_pairs": 40}
    curves = [curve("as it was", 0.7, 0.6, 0.5, heldout=held)]
    curves += [
        curve(
            "changed",
            0.7,
            0.4,
            heldout={**held, "heldout_accuracy": 0.66},
            ended="update 6 gives a loss that is not finite",
        )
    ]
    found = result(curves=curves, window=[4, 6], changes={"beta": [2000.0, 500.0]}, without=["-7"])
    page = Page(replay.render(found, pictures(2)))
    for shown in (replay.lines(found), page.text):
        assert "Updates 4 to 6 made again with beta 2000.0 -> 500.0; without -7." in shown
        assert (
            "as it was: update 6, loss 0.5000, gradient norm 1, held-out accuracy 0.610 (0.50 to 0.70 of 40 pairs)."
            in shown
        )
        assert "changed: update 5, loss 0.4000" in shown and "0.660" in shown and "update 6 gives a loss" in shown
    assert page.tags.count("svg") == 2 and len(page.ids) == len(set(page.ids))
    bare = result(curves=[curve("as it was", 0.7), curve("changed", 0.6)])
    assert "The run measures no held-out pairs" in replay.lines(bare)


def test_a_curve_that_ends_at_once_is_drawn():
    found = result(curves=[curve("as it was", 0.7, 0.6), curve("changed", ended="update 4 gives x")])
    assert Page(replay.render(found, [])).tags.count("svg") == 2 and "changed: update 4 gives x." in replay.lines(found)


def test_a_second_replay_takes_the_place_of_the_first(tmp_path):
    replay.write(tmp_path / "found", result(), pictures(2))
    page = replay.write(tmp_path / "found", result(update=9, pairs=[pair(3)]), pictures(1))
    assert sorted(path.name for path in (tmp_path / "found" / "images").iterdir()) == ["01-lose.png", "01-win.png"]
    assert json.loads((tmp_path / "found" / "replay.json").read_text(encoding="utf-8"))["update"] == 9
    assert page == tmp_path / "found" / "replay.html" and "Update 9 of" in page.read_text(encoding="utf-8")
    assert Image.open(tmp_path / "found" / "images" / "01-lose.png").getpixel((0, 0)) == (9, 0, 0)
