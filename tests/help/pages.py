"""Pages under test: what a parser makes of them, and what a real browser shows."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from html.parser import HTMLParser

import pytest

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
