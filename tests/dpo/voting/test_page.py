"""The page of a study in a real browser: raters at the keyboard, on a phone, in two tabs, and without a server for a while."""

import json
import random
import time
from collections import Counter

import pytest

from dpo.voting import report, study
from dpo.voting.answers import FILE, read
from dpo.voting.server import Place
from tests.help.browser import Browser
from tests.help.votes import make_study, served

GLANCE = 0.42  # seconds: the page takes no answer to a pair that was seen for less
SEEN = "!document.getElementById('ask').hidden && !document.querySelector('#pair.loading')"
AT_END = "!document.getElementById('end').hidden"
# What a person sees of both images: "red", "green", or "noise".
COLOURS = """['image0', 'image1'].map((id) => {
  const image = document.getElementById(id), canvas = document.createElement('canvas');
  canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
  const draw = canvas.getContext('2d');
  draw.drawImage(image, 0, 0);
  const row = draw.getImageData(0, canvas.height - 6, canvas.width, 1).data;
  let change = 0;
  for (let i = 4; i < row.length; i += 4) { change += Math.abs(row[i] - row[i - 4]) + Math.abs(row[i + 1] - row[i - 3]); }
  if (change > 100) { return 'noise'; }
  return row[0] > row[1] ? 'red' : 'green';
})"""

# Notes when a pair came into sight, and does what window.then says at that very moment.
WATCH = """(() => {
  const pair = document.getElementById('pair');
  window.seenAt = performance.now();
  new MutationObserver(() => {
    if (!pair.classList.contains('loading')) { window.seenAt = performance.now(); window.then?.(); }
  }).observe(pair, { attributes: true });
})()"""
EARLY = """(() => { window.early = 0; window.then = () => {
  document.dispatchEvent(new KeyboardEvent('keydown', { key: '2' }));
  document.getElementById('right').click();
  window.early += 1;
}; })()"""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile")) as running:
        yield running
        # A page that is open still when its server is stopped asks it in vain: no fault of the page.
        assert [line for line in running.console() if "ERR_CONNECTION_REFUSED" not in line] == []


@pytest.fixture
def folder(tmp_path):
    make_study(tmp_path / "study", 12, votes=2, checks=0.0, repeats=0.0)
    return tmp_path / "study"


def come(browser, address, name, **options):
    """A rater who comes in and sees the first question."""
    tab = browser.page(address, **options)
    tab.wait("!document.getElementById('intro').hidden")
    assert tab("document.getElementById('notice').textContent.length") > 20
    tab.wait("document.activeElement.id === 'name'")
    tab.type(name)
    tab.key("Enter")
    tab.wait(SEEN)
    tab(WATCH)
    return tab


def done(tab):
    return tab("document.getElementById('bar').value")


def press(tab, key, count=None):
    """Looks for long enough, presses a key, and waits for the count of answers."""
    before = done(tab)
    time.sleep(GLANCE)
    tab.key(key)
    count = before + 1 if count is None else count
    tab.wait(f"document.getElementById('bar').value === {count} && (({SEEN}) || ({AT_END}))")


@pytest.mark.slow
def test_a_whole_study_by_raters_at_the_keyboard(browser, tmp_path):
    """Three raters answer 40 questions each, and what is on disk is what they meant."""
    folder, draw = tmp_path / "study", random.Random(0)
    declared = make_study(folder, 40, votes=3, questions=(study.Question("prefer", "Which one?"),))
    meant, keys = {}, {"left": "1", "right": "2", "tie": "3"}
    with served(folder) as web:
        tabs = {name: come(browser, web.address, name, own=True) for name in ("Anna", "Ben", "Cleo")}
        seen = dict.fromkeys(tabs, "")
        while tabs:
            for name, tab in list(tabs.items()):
                if tab(AT_END):
                    assert tab("document.getElementById('endtitle').textContent") == "Thank you"
                    del tabs[name]
                    continue
                ready = tab(
                    f"({SEEN}) && performance.now() - window.seenAt > {1000 * GLANCE} && document.getElementById('image0').src"
                )
                if not ready or ready == seen[name]:
                    time.sleep(0.02)
                    continue  # the others meanwhile
                colours, seen[name] = tab(COLOURS), ready
                if "noise" in colours:
                    side = ("left", "right")[colours[0] == "noise"]
                elif colours[0] == colours[1]:
                    side = "tie"
                else:
                    wanted = "green" if draw.random() < 0.7 else "red"
                    side = ("left", "right")[colours[1] == wanted]
                meant.setdefault(name, []).append((side, *colours))
                tab.key(keys[side])
    found = read(folder)
    items = {item.id: item for item in declared.items}
    for name, choices in meant.items():
        mine = [one for one in found if one.rater == name]
        assert len(mine) == len(choices) == 40 + 4 + 2
        for answer, (side, *colours) in zip(mine, choices, strict=True):
            item = items[answer.item]
            shown = [item.sides[which] for which in (answer.left, 1 - answer.left)]
            assert [{-1: "noise", 0: "red", 1: "green"}[which] for which in shown] == colours
            chosen = {"left": answer.left, "right": 1 - answer.left}.get(side)
            assert answer.choice == ("tie" if chosen is None else ("first", "second")[chosen])
    votes = [one for one in found if items[one.item].kind == "vote" and not one.repeat]
    assert Counter(Counter((one.item, one.question) for one in votes).values()) == {3: 40}
    share = sum(one.choice == "second" for one in votes) / len(votes)
    assert 0.58 < share < 0.82 and 0.25 < sum(one.left for one in votes) / len(votes) < 0.75
    assert all(0.3 < one.seconds < 60 for one in found)
    assert sum(one.repeat for one in found) == 6
    report.make(folder)
    content = json.loads((folder / "votes.json").read_text("utf-8"))
    said = content["questions"][0]["pairs"][0]["everyone"]
    assert said["votes"]["win_rate"] == pytest.approx(share) and said["votes"]["prompts"] == 40
    low, high = said["votes"]["interval"]
    assert low < 0.7 < high and said["majority"]["win_rate"] >= said["votes"]["win_rate"]
    assert content["left_out"] == [] and {rater["votes"] for rater in content["raters"]} == {40}


@pytest.mark.long
def test_reload_undo_back_double_click_and_two_tabs(browser, folder):
    with served(folder) as web:
        tab = come(browser, web.address, "Anna", own=True)
        assert tab("document.title") == "Which image is better?" and tab("document.getElementById('undo').disabled")
        first = tab("document.getElementById('image0').src")
        for key in ("a", "4", "Enter", "Backspace"):  # nothing to take back yet
            tab.key(key)
        tab(EARLY)  # from now on a click and a key at the moment in which a pair is seen: too early
        press(tab, "ArrowLeft")
        assert tab("window.early") == 1 and done(tab) == 1
        second = tab("document.getElementById('image0').src")
        tab.call("Page.reload")  # the same question, and no instructions again
        tab.wait(f"{SEEN} && document.getElementById('image0').src === {second!r}")
        assert done(tab) == 1
        tab(WATCH + ";" + EARLY)
        time.sleep(GLANCE)
        tab(
            "document.getElementById('right').click(); document.getElementById('right').click()"
        )  # a double click is one answer
        tab.wait("window.early === 1 && document.getElementById('bar').value === 2")
        time.sleep(0.3)
        assert done(tab) == 2 and len(read(folder)) == 2
        press(tab, "u", 1)
        assert tab("document.getElementById('image0').src") == second
        press(tab, "Backspace", 0)
        assert tab("document.getElementById('image0').src") == first and read(folder) == []
        press(tab, "3")
        press(tab, "ArrowRight")
        press(tab, "ArrowDown")
        assert [one.choice for one in read(folder)][::2] == ["tie", "tie"] and len(read(folder)) == 3
        third = tab("document.getElementById('image0').src")
        tab.open("about:blank")  # away, and back again
        tab.wait("location.href === 'about:blank'")
        tab.back()
        tab.wait(f"location.href === {web.address!r} && {SEEN} && document.getElementById('image0').src === {third!r}")
        press(tab, "2")
        assert len(read(folder)) == 4
        lines = (folder / FILE).read_text("utf-8").splitlines()
        assert len(lines) == 8 and sum('"undo"' in line for line in lines) == 2


@pytest.mark.slow
def test_two_tabs_of_one_rater_answer_each_question_once(browser, folder):
    with served(folder) as web:
        one = come(browser, web.address, "Ben")
        two = browser.page(web.address)
        two.wait("document.getElementById('start').textContent === 'Start as Ben'")
        two.click("#start")
        two.wait(SEEN)
        same = "document.getElementById('image0').src"
        assert one(same) == two(same)
        press(one, "1")
        time.sleep(GLANCE)
        two.key("2")  # it still shows what was answered in the other one
        two.wait(f"{same} === {one(same)!r}")
        assert [answer.choice for answer in read(folder)] == [read(folder)[0].choice] and done(two) == 1
        press(two, "2")
        time.sleep(GLANCE)
        one.key("u")  # would take back what is not the last any more
        one.wait("document.getElementById('bar').value === 2")
        assert len(read(folder)) == 2


COME_BACK = "document.dispatchEvent(new Event('visibilitychange'))"  # as a tab does that is looked at again


def test_a_tab_that_is_looked_at_again_shows_where_the_rater_is(browser, folder):
    with served(folder) as web:
        one = come(browser, web.address, "Finn")
        two = browser.page(web.address)
        two.wait(f"{SEEN} || document.getElementById('start').textContent === 'Start as Finn'")
        two.click("#start")
        two.wait(SEEN)
        press(one, "1")
        two(COME_BACK)
        same = "document.getElementById('image0').src"
        two.wait(f"{SEEN} && {same} === {one(same)!r}")
        assert done(two) == 1 and len(read(folder)) == 1


@pytest.mark.slow
def test_who_waits_for_others_goes_on_by_oneself(browser, tmp_path):
    make_study(tmp_path / "study", 2, votes=1, questions=(study.Question("q", "Which?"),), checks=0.0, repeats=0.0)
    with served(tmp_path / "study") as web:
        one = come(browser, web.address, "Gina", own=True)
        two = browser.page(web.address, own=True)
        two.wait("document.activeElement.id === 'name'")
        two.type("Hans")
        two.click("#start")
        two.wait(f"{AT_END} && document.getElementById('endtitle').textContent === 'A moment, please'")
        press(one, "1")
        press(one, "2")
        assert one("document.getElementById('endtitle').textContent") == "Thank you"
        two(COME_BACK)
        two.wait("document.getElementById('endtitle').textContent === 'Thank you'")
        one.click("#endundo")  # the last answer is taken back from the last page too
        one.wait(SEEN)
        assert len(read(tmp_path / "study")) == 1


def test_an_image_that_cannot_be_shown_is_said_and_one_that_comes_late_is_waited_for(browser, folder):
    kept = {path: path.read_bytes() for path in folder.parent.glob("*model/*.png")}
    with served(folder) as web:
        for path in kept:
            path.write_bytes(b"no image")
        tab = browser.page(web.address, own=True)
        tab.wait("document.activeElement.id === 'name'")
        tab.type("Ida")
        tab.key("Enter")
        tab.wait("document.getElementById('line').textContent.startsWith('this image cannot be shown')")
        time.sleep(GLANCE)
        tab.key("1")  # nothing to be seen, nothing to answer
        assert read(folder) == []
        for path, data in kept.items():
            path.write_bytes(data)
        tab.call("Page.reload")
        tab.wait(SEEN)
        press(tab, "1")
        web.desk._codes.clear()  # as after a new start of the server: addresses of before are gone
        web.desk._held.clear()
        press(tab, "2")
        assert len(read(folder)) == 2
    browser.events = [event for event in browser.events if "status of 4" not in str(event)]


def test_the_server_is_gone_between_click_and_answer(browser, folder):
    with served(folder) as web:
        port = web.port
        tab = come(browser, web.address, "Cleo", own=True)
        press(tab, "1")
    time.sleep(GLANCE)
    tab.key("2")
    tab.wait("document.getElementById('line').textContent.includes('tries again')")
    tab.key("1")  # an impatient rater
    tab.call("Page.reload")  # a page that is loaded anew has no server either: the browser says so
    time.sleep(0.5)
    with served(folder, Place(port=port)):
        tab.open(f"http://127.0.0.1:{port}/")
        tab.wait(f"{SEEN} && document.getElementById('bar').value === 2")  # what was kept in the browser has come
        assert len(read(folder)) == 2
        press(tab, "1")
    time.sleep(GLANCE)
    tab.key("1")
    tab.wait("document.getElementById('line').textContent.includes('tries again')")
    with served(folder, Place(port=port)):  # and without a reload
        tab.wait(f"{SEEN} && document.getElementById('bar').value === 4")
        assert len(read(folder)) == 4 and tab("document.getElementById('line').textContent") == ""
    assert len({(one.item, one.question) for one in read(folder)}) == 4
    browser.events = [event for event in browser.events if "net::ERR_" not in str(event)]


def test_an_answer_that_was_kept_comes_though_somebody_else_sits_here_now(browser, folder):
    with served(folder) as web:
        port = web.port
        tab = come(browser, web.address, "Kim")
    time.sleep(GLANCE)
    tab.key("2")
    tab.wait("document.getElementById('line').textContent.includes('tries again')")
    tab.open("about:blank")
    with served(folder, Place(port=port)) as web:
        other = browser.page(web.address)
        other.wait("document.getElementById('start').textContent === 'Start as Kim'")
        other.click("#other")
        other.type("Lou")
        other.key("Enter")
        other.wait(SEEN)
        assert [one.rater for one in read(folder)] == ["Kim"] and done(other) == 0
        assert other("Object.keys(localStorage).length") == 1  # Lou's name alone
    browser.events = [event for event in browser.events if "net::ERR_" not in str(event)]


@pytest.mark.slow
def test_an_answer_that_another_study_refused_is_kept_for_its_own(browser, folder, tmp_path):
    """The other study was served at the same address meanwhile."""
    (tmp_path / "more").mkdir()
    make_study(tmp_path / "more" / "study", 4, votes=2, checks=0.0, repeats=0.0)
    kept = "Object.keys(localStorage).filter((name) => name.startsWith('dpo.vote.pending.')).length"
    with served(folder) as web:
        port = web.port
        tab = come(browser, web.address, "Mia", own=True)
    time.sleep(GLANCE)
    tab.key("2")
    tab.wait("document.getElementById('line').textContent.includes('tries again')")
    with served(tmp_path / "more" / "study", Place(port=port)):
        tab.wait("document.getElementById('line').textContent.includes('open the page anew')")
        assert tab(kept) == 1
    with served(folder, Place(port=port)):
        tab.open(f"http://127.0.0.1:{port}/")
        tab.wait("document.activeElement.id === 'name'")
        tab.type("Mia")
        tab.key("Enter")
        tab.wait(f"{SEEN} && document.getElementById('bar').value === 1")
        assert [one.rater for one in read(folder)] == ["Mia"] and tab(kept) == 0
    browser.events = [
        event for event in browser.events if not any(one in str(event) for one in ("net::ERR_", "status of 403"))
    ]


LAYOUT = """(() => {
  const box = (id) => { const b = document.getElementById(id).getBoundingClientRect(); return [b.x, b.y, b.width, b.height]; };
  const root = document.documentElement;
  return { overflow: [root.scrollWidth - innerWidth, root.scrollHeight - innerHeight], images: [box('image0'), box('image1')],
    buttons: [box('left'), box('tie'), box('right')], size: [innerWidth, innerHeight] };
})()"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("width", "height", "stacked"),
    [(1280, 900, False), (390, 844, True), (320, 568, True), (844, 390, False), (820, 1180, True)],
)
def test_both_images_are_seen_whole_on_every_screen(browser, folder, tmp_path, width, height, stacked):
    with served(folder) as web:
        tab = come(browser, web.address, "Dora", width=width, height=height, own=True, mobile=width < 900)
        seen = tab(LAYOUT)
        tab.screenshot(tmp_path / f"{width}x{height}.png")
        one, two = seen["images"]
        assert max(seen["overflow"]) <= 0 and one[2:] == pytest.approx(two[2:], abs=1) and min(one[2:]) >= 120
        assert (two[1] > one[1] + one[3] - 2) == stacked and (two[0] > one[0] + one[2] - 2) == (not stacked)
        for box in (*seen["images"], *seen["buttons"]):
            assert box[0] >= 0 and box[1] >= 0 and box[0] + box[2] <= width + 0.5 and box[1] + box[3] <= height + 0.5
        assert all(box[3] >= 44 and box[2] >= 44 for box in seen["buttons"])
        tab.click("#zoom1")  # enlarged, and back
        tab.wait("document.getElementById('zoom').open && document.getElementById('large').naturalWidth === 48")
        assert tab("document.getElementById('which').textContent") == "Image 2"
        tab.key("ArrowLeft")
        assert tab("document.getElementById('which').textContent") == "Image 1" and done(tab) == 0
        tab.key("1")
        assert done(tab) == 0  # an enlarged image is looked at, not answered
        tab.click("#zoom")
        tab.wait("!document.getElementById('zoom').open")
        time.sleep(GLANCE)
        tab.click("#left")
        tab.wait("document.getElementById('bar').value === 1")


def test_prompts_are_text_and_the_next_pair_is_loaded_ahead(browser, folder):
    with served(folder) as web:
        tab = come(browser, web.address, "Emil", own=True)
        assert (
            "<b>&amp;" in tab("document.getElementById('prompt').textContent")
            and tab("document.querySelectorAll('b').length") == 0
        )
        loaded = "performance.getEntriesByType('resource').filter((one) => one.name.includes('/image/')).map((one) => one.name)"
        tab.wait(f"({loaded}).length === 4")
        ahead = set(tab(loaded))
        press(tab, "1")
        assert {tab("document.getElementById('image0').src"), tab("document.getElementById('image1').src")} < ahead


@pytest.mark.slow
def test_links_of_ones_own_and_a_closed_page(browser, folder):
    from dpo.voting import raters

    with served(folder, invited=("Anna Berg",)) as web:
        tab = browser.page(web.address, own=True)
        tab.wait("!document.getElementById('end').hidden")
        assert "by personal link alone" in tab("document.getElementById('line').textContent")
        tab.open(f"{web.address}#{raters.key_of(study.secret(folder), 'Anna Berg')}")
        tab.wait("document.getElementById('start').textContent === 'Start as Anna Berg'")
        tab.key("Tab")
        tab.click("#start")
        tab.wait(SEEN)
        press(tab, "1")
        assert [one.rater for one in read(folder)] == ["Anna Berg"]
    browser.events = [event for event in browser.events if "status of 403" not in str(event)]
