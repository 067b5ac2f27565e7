"""evaluation.html and evaluation.md, from evaluation.json alone."""

import json
import re

import pytest
from PIL import Image

from dpo.common.errors import UserError
from dpo.pages.evaluation import headline, markdown, render, write_pages
from tests.help.evaluations import entry, evaluation, paired
from tests.help.pages import Page, look

EVIL = '</td><script>alert(1)</script><img src="http://x.example/" onerror="x"> | {{ 7 * 6 }} & "'


def test_the_table_has_a_row_for_each_side_and_scorer():
    text = markdown(evaluation(entry(), entry("hpsv2.1", "dde")))
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 4 and all(line.count("|") == 8 for line in rows)
    assert "| dpo | pickscore | 20.56 (20.5) | 20.99 (21) | +0.43 (+0.31 to +0.55) | 0.620 (0.570 to 0.670)" in text
    assert "sampler: DDIM; steps: 20" in text
    assert len(headline(evaluation(entry(), entry("hpsv2.1", "dde")))) == 2


@pytest.fixture
def pictures(tmp_path):
    names = []
    for number, colour in enumerate(("red", "blue", "green", "white")):
        names.append(str(tmp_path / f"{number}.png"))
        Image.new("RGB", (640, 640), colour).save(names[-1])
    return names


def of_set(scorer, side, value, interval=None, difference=None, between=None):
    found = {"scorer": scorer, "side": side, "value": value, "interval": interval, "images": 9}
    return found | {"difference": difference, "difference_interval": between}


SETS = [
    of_set("diversity", "start", 0.4, [0.3, 0.5]),
    of_set("diversity", "dpo", 0.3, [0.2, 0.4], -0.1, [-0.12, -0.08]),
    of_set("fid", "dpo", 12.0, difference=2.0),
]


def test_scores_of_sets_have_a_table_and_a_line_each():
    found = evaluation(entry()) | {"sets": SETS}
    text = markdown(found)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.count("|") for line in rows] == [8] * 3 + [6] * 5
    assert rows[-3:] == [
        "| start | diversity | 0.4 (0.3 to 0.5) |  | higher |",
        "| dpo | diversity | 0.3 (0.2 to 0.4) | -0.1 (-0.12 to -0.08) | higher |",
        "| dpo | fid | 12 | +2 | lower |",
    ]
    assert list(headline(found))[1:] == [
        "diversity of all images of start: 0.4 (0.3 to 0.5)",
        "diversity of all images of dpo: 0.3 (0.2 to 0.4), -0.1 (-0.12 to -0.08) to start (higher is better)",
        "fid of all images of dpo: 12, +2 to start (lower is better)",
    ]
    alone = evaluation() | {"sets": SETS}
    assert [line.count("|") for line in markdown(alone).splitlines() if line.startswith("|")] == [6] * 5
    assert len(headline(alone)) == 3
    page = Page(render(alone))
    assert "Scores of the whole set" in page.text and "The figures" not in page.text


ACCURACY = {
    "side": "dpo",
    "accuracy": 0.608,
    "interval": [0.59, 0.62],
    "pairs": 1000,
    "deciles": [0.5, None, *[0.6] * 8],
}


def rich(pictures, prompt="a fox"):
    """An evaluation with everything that a page can show."""
    gains, losses = (
        [[prompt, 1.5, *pictures[:2]]],
        [[prompt, -0.5, *pictures[2:]], [prompt, -0.1, "gone.png", "gone.png"]],
    )
    kinds = {"animals": paired(), "food": paired((0.5, 0.4, 0.6))}
    worth = {"n": 2.0, "text": "2.0 (1.7 to 2.4)"}
    found = evaluation(entry(gains=gains, losses=losses, categories=kinds, worth=worth), prompt=prompt)
    found["results"][0]["best_guidance"] = {"base": "start, guidance 7.5", "paired": paired((0.55, 0.5, 0.6))}
    line = {
        "model": "SD1.5",
        "scorer": "pickscore",
        "ours": 20.5,
        "published": 20.56,
        "difference": -0.06,
        "tolerance": 0.03,
    }
    return found | {
        "published": {"title": "LPO", "source": "arXiv 2502.01051", "protocol": {"seeds": "unstated"}, "lines": [line]},
        "sets": SETS,
        "accuracy": [ACCURACY],
    }


def test_the_page_stands_alone_and_is_whole(pictures):
    page = Page(text := render(rich(pictures)))
    assert "script" not in page.tags and all(ref.startswith(("data:", "#")) for ref in page.refs)
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert len(page.ids) == len(set(page.ids))
    order = ["dpo is better than start", "Win rate by pickscore", "Worth by pickscore", "The figures", "by category",
             "Largest gains", "Largest losses", "Scores of the whole set", "+2", "Implicit preference accuracy",
             "By tenth of the timesteps", "Beside published numbers", "seeds unstated",
             "Against the base at its best guidance", "0.550", "What was compared"]  # fmt: skip
    places = [page.text.index(part) for part in order]
    assert places == sorted(places)
    assert page.tags.count("img") == 4 + 4, "each small in its row and once large"
    lines = markdown(rich(pictures)).splitlines()
    assert "| dpo | 0.608 (0.590 to 0.620) | 1000 |" in lines
    assert "| dpo | 0.50 |  | " + "0.60 | " * 7 + "0.60 |" in lines
    assert (
        "| dpo | pickscore | start, guidance 7.5 | +0.43 (+0.31 to +0.55) | 0.550 (0.500 to 0.600), 1% ties |" in lines
    )
    assert "| SD1.5 | pickscore | 20.5 | 20.56 | -0.06 | 0.03 |" in lines


def test_nothing_of_the_users_is_markup(pictures):
    found = rich(pictures, EVIL)
    found["sides"][0]["name"] = found["sides"][1]["place"] = EVIL
    found["sides"][0]["protocol"] = {EVIL: EVIL}
    found["scorers"][0] |= {"scale": EVIL, "note": EVIL}
    found["sets"] = [{**one, "side": EVIL, "scorer": EVIL} for one in SETS]
    found["results"][0]["categories"] = {EVIL: paired()}
    page = Page(render(found))
    assert "script" not in page.tags and all(ref.startswith(("data:", "#")) for ref in page.refs)
    assert "{{ 7 * 6 }}" in page.text
    lines = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert [line.count("|") - line.count("\\|") for line in lines] == [8] * 3 + [6] * 8 + [4] * 3 + [12] * 3 + [7] * 3


@pytest.mark.long
def test_a_browser_shows_it(pictures, tmp_path):
    for width, columns in ((360, 1), (1200, 3)):
        seen, said = look(render(rich(pictures)), tmp_path, width)
        assert said == [] and seen["overflow"] == 0 and seen["columns"] == columns and seen["text"] >= 11


def test_written_beside_the_figures(tmp_path):
    path = tmp_path / "evaluation.json"
    path.write_text(json.dumps(evaluation(entry())))
    assert [made.name for made in write_pages(path)] == ["evaluation.html", "evaluation.md"]
    for text in ("", "[]", "{}", "{" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="python -m dpo.evaluate again"):
            write_pages(path)


def test_an_accuracy_alone_is_no_verdict_on_images():
    found = evaluation() | {"accuracy": [ACCURACY], "scorers": []}
    found["sides"].append({**found["sides"][0], "name": "dpo", "images": 0, "protocol": None})
    page = Page(render(found))
    assert "Whose preferences it has, beside start" in page.text and "Is it better" not in page.text
    assert "Scorers" not in page.text and "another program" not in page.text and "0.608" in page.text
    assert list(headline(found)) == [
        "implicit preference accuracy of dpo against start: 0.608 (0.590 to 0.620) on 1,000 pairs"
    ]
