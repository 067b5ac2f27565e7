"""dpo.report: one page that stands alone, escapes everything, and shows in a real browser on a phone and in the dark."""

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

from dpo.common.errors import UserError
from dpo.pages.report import render, write_report
from dpo.report import main
from tests.help.fake_run import run_of

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
VOID = {"meta", "link", "img", "br", "hr", "input"}


class Page(HTMLParser):
    """Checks nesting and collects what a page refers to, its ids and its text."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.refs, self.ids, self.tags, self.words = [], [], [], [], []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.ids += [value for name, value in attrs if name == "id"]
        self.refs += [
            value for name, value in attrs if name in ("src", "href", "xlink:href", "data", "action", "poster")
        ]
        assert not [name for name, _ in attrs if name.startswith("on")]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if not {"style", "script"} & set(self.open):
            self.words.append(data)

    @property
    def text(self):
        return " ".join(" ".join(self.words).split())


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


def test_warnings_stand_before_the_pictures(blank_charts):
    text = Page(render(run_of("over"))).text
    assert text.index("at a price") < text.index("Both errors rise") < text.index("Pictures")


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


# --- in a browser: Debian's chromium will do. Without one these do not run, unless DPO_NEEDS_BROWSER is set.

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage", "--enable-logging=stderr", "--dump-dom",
    "--window-size=1400,1000",
)  # fmt: skip
MEASURE = """<!doctype html><meta charset="utf-8"><body>
<iframe id="f" style="width:%dpx;height:900px;border:0" srcdoc="%s"></iframe>
<script>
document.getElementById("f").onload = (event) => {
  const page = event.target.contentWindow, root = page.document.documentElement;
  const pictures = [...page.document.images];
  const chart = page.document.querySelector(".chart svg");
  const colour = (selector, name) => page.getComputedStyle(page.document.querySelector(selector))[name];
  const text = [...chart.querySelectorAll("text")].map((item) => item.getBoundingClientRect().height);
  document.body.innerHTML = "<pre id='seen'>" + JSON.stringify({
    overflow: root.scrollWidth - root.clientWidth, pictures: pictures.map((image) => image.naturalWidth),
    columns: colour(".grid", "gridTemplateColumns").split(" ").length,
    page: colour("body", "backgroundColor"), ink: colour("body", "color"),
    line: page.getComputedStyle(chart.querySelector("[style*='--policy']")).stroke,
    text: Math.min(...text) }) + "</pre>";
};
</script>"""


def look(text, tmp_path, width, dark=False):
    """What a headless browser makes of the page in a window of this width, and what it says on its console."""
    if BROWSER is None:
        if os.environ.get("DPO_NEEDS_BROWSER"):
            pytest.fail("no chromium found: apt-get install chromium")
        pytest.skip("no chromium here; the parser's tests of the same page have run")
    (tmp_path / "outer.html").write_text(MEASURE % (width, html.escape(text)), encoding="utf-8")
    options = [*FLAGS, f"--user-data-dir={tmp_path / 'profile'}"]
    options += ["--blink-settings=preferredColorScheme=0"] if dark else []
    done = subprocess.run(
        [BROWSER, *options, f"file://{tmp_path / 'outer.html'}"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    found = re.search(r'<pre id="seen">(.*?)</pre>', done.stdout, re.S)
    assert found, done.stderr[-2000:]
    return json.loads(html.unescape(found.group(1))), re.findall(r".*CONSOLE.*", done.stderr)


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


def test_a_browser_shows_it_on_a_desktop_in_the_light(dde, tmp_path):
    seen, said = look(dde, tmp_path, 1200)
    assert said == []
    assert seen["overflow"] == 0 and seen["columns"] == 3 and seen["text"] >= 11
    assert seen["page"] == "rgb(246, 246, 248)" and seen["line"] == "rgb(37, 99, 201)"


def test_the_browser_would_say_so(dde, tmp_path):
    """The console is heard: a page that asks the network is told on."""
    spoiled = dde.replace("</main>", '<img src="http://x.example/a.png"><p style="width:3000px">wide</p></main>')
    seen, said = look(spoiled, tmp_path, 360)
    assert seen["overflow"] > 2000 and any("Content Security Policy" in line for line in said)
