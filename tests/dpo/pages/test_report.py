"""dpo.report: one page that stands alone, escapes everything, and shows in a real browser on a phone and in the dark."""

import json
import re
import shlex

import pytest

from dpo.common.errors import UserError
from dpo.pages.report import _facts, _subtitle, _tiles, render, write_report
from dpo.report import main
from tests.help.fake_run import run_of
from tests.help.pages import Page, look


@pytest.fixture(scope="module")
def dde():
    """The page of the run that has everything."""
    return render(run_of("dde"))


@pytest.fixture
def blank_charts(monkeypatch):
    """Charts take most of a page's time: empty ones for the tests of what is around them."""
    monkeypatch.setattr("dpo.pages.report.as_svg", lambda chart, run: "<svg></svg>")


@pytest.mark.parametrize("kind", ["dde", "lora-gpu", "early", "failed", "sft"])
def test_the_page_stands_alone(kind, dde, blank_charts):
    text = dde if kind == "dde" else render(run_of(kind))
    page = Page(text)
    assert all(ref.startswith(("data:", "#")) for ref in page.refs)
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert len(page.ids) == len(set(page.ids)) and "script" not in page.tags
    assert page.tags.count("svg") >= 5 and len(text) < 1_500_000


def test_the_verdict_comes_first_and_everything_is_there(dde):
    text = Page(dde).text
    order = [
        "It worked",
        "Held-out accuracy",
        "Pictures",
        "Did it learn?",
        "Where in the denoising?",
        "Credit by timestep",
        "What ran",
    ]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    for part in (
        "0.633",
        "a frog on a purple background",
        "Weight by timestep",
        "Correction C(t)",
        "800",
        "2.13.0",
        "DDE (single-shot",
    ):
        assert part in text


def test_what_was_trained_is_no_unet_where_there_is_a_transformer():
    trained = [dict(_facts(run_of(kind))[0][1])["trained"] for kind in ("good", "lora-gpu")]
    assert trained == ["all weights", "LoRA of rank 16"]


def test_warnings_stand_before_the_pictures(blank_charts):
    text = Page(render(run_of("over"))).text
    assert text.index("at a price") < text.index("Both errors rise") < text.index("Pictures")


def test_a_run_that_has_a_name_goes_by_it(blank_charts):
    run = run_of("lora-gpu")
    output = {**run.settings["output"], "run_name": "red foxes"}
    text = render(run._replace(settings={**run.settings, "output": output}))
    assert "<title>red foxes: alignment report</title>" in text and "<h1>red foxes</h1>" in text
    assert f"red foxes {run.model_name} · " in Page(text).text and f"<h1>{run.model_name}</h1>" in render(run)


def test_changed_settings_are_marked(dde):
    assert re.search(r"<td[^>]*>method</td><td><strong>dde</strong>", dde)
    assert re.search(r'<tr class="quiet"><td[^>]*>gamma</td><td>0\.99475<', dde)


def test_nothing_of_the_users_is_markup(dde, blank_charts):
    run = run_of("good")
    evil = '</td><script>alert(1)</script><img src="http://x.example/" onerror="x"> {{ 7 * 6 }} & "'
    settings = {evil: {evil: evil}, "model": {"model": evil}, "data": {"data": evil}, "method": {"method": evil}}
    summary = {
        **run.summary,
        "device": evil,
        "versions": {evil: evil},
        "warnings": [evil],
        "notes": [evil],
        "reason": evil,
    }
    for status in ("failed", "finished"):
        text = render(run._replace(settings=settings, summary={**summary, "status": status}))
        page = Page(text)
        assert "script" not in page.tags and all(ref.startswith(("data:", "#")) for ref in page.refs)
        assert "{{ 7 * 6 }}" in page.text and page.tags.count("img") == dde.count("<img")


def test_a_prompt_with_markup_is_shown_as_it_is(dde):
    assert 'a <b>cake</b> & a "quoted" cup' in Page(dde).text


def test_a_foreign_picture_is_shown_whole(tmp_path, blank_charts):
    from PIL import Image

    Image.new("RGB", (3000, 10), "red").save(tmp_path / "x.png")
    text = render(run_of("early")._replace(grids=[tmp_path / "x.png"]))
    assert text.count("<img") == 1 and 'alt="Sample images"' in text


def test_one_line_and_no_line_make_a_page_too(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    assert "No update was recorded" in Page(write_report(tmp_path).read_text("utf-8")).text
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "loss": 0.69, "pairs": 4}) + "\n")
    assert "Too early to tell" in Page(write_report(tmp_path).read_text("utf-8")).text


def test_the_command(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path)]) == 0 and capsys.readouterr().out.strip() == str(tmp_path / "report.html")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["metrics.jsonl", "report.html"]
    assert main([str(tmp_path / "none")]) == 2
    assert capsys.readouterr().err.startswith("dpo.report: ") and not (tmp_path / "none").exists()
    with pytest.raises(UserError):
        write_report(tmp_path / "none")


@pytest.mark.long
def test_a_browser_shows_it_on_a_phone_in_the_dark(dde, tmp_path):
    seen, said = look(dde, tmp_path, 360, dark=True)
    assert said == []
    assert seen["overflow"] == 0 and seen["columns"] == 1 and seen["text"] >= 11
    assert len(seen["pictures"]) == 12 and min(seen["pictures"]) > 100
    assert (
        seen["page"] == "rgb(20, 20, 23)"
        and seen["ink"] == "rgb(236, 236, 241)"
        and seen["line"] == "rgb(122, 167, 255)"
    )


@pytest.mark.long
def test_a_browser_shows_it_on_a_desktop_in_the_light(dde, tmp_path):
    seen, said = look(dde, tmp_path, 1200)
    assert said == []
    assert seen["overflow"] == 0 and seen["columns"] == 3 and seen["text"] >= 11
    assert seen["page"] == "rgb(246, 246, 248)" and seen["line"] == "rgb(37, 99, 201)"


@pytest.mark.long
def test_the_browser_would_say_so(dde, tmp_path):
    """The console is heard: a page that asks the network is told on."""
    spoiled = dde.replace("</main>", '<img src="http://x.example/a.png"><p style="width:3000px">wide</p></main>')
    seen, said = look(spoiled, tmp_path, 360)
    assert seen["overflow"] > 2000 and any("Content Security Policy" in line for line in said)


def test_updates_that_stand_out_are_named_with_their_command(blank_charts):
    run = run_of("good")
    updates = [dict(update) for update in run.updates]
    updates[40]["grad_norm"] = 90.0
    spiked = run._replace(updates=updates)
    text = Page(render(spiked)).text
    assert "Updates that stand out" in text and "grad norm 90" in text
    assert f"python -m dpo.replay {shlex.quote(str(run.folder))} --update {updates[40]['step']}" in text
    assert "Updates that stand out" not in Page(render(run)).text


@pytest.mark.parametrize(("method", "hint"), [
    ("dpo", "0.6931 at the start"), ("mapo", ""), ("kto", ""), ("sft", "mean squared error"),
])  # fmt: skip
def test_what_the_loss_is_called(method, hint):
    run = run_of("good")
    run = run._replace(settings={**run.settings, "method": {**run.settings["method"], "method": method}})
    (tile,) = [tile for tile in _tiles(run) if tile.label == "Loss"]
    assert tile.hint == hint


@pytest.mark.parametrize(("starts", "said"), [((0,), False), ((0, 30), True), ((0, 60), False)])
def test_a_duration_that_is_of_the_last_start_alone_says_so(starts, said):
    run = run_of("good")
    run = run._replace(events=[{"event": "started", "step": step} for step in starts])
    assert ("since the last start" in _subtitle(run)) == said and "1m 06s" in _subtitle(run)
