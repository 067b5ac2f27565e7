"""votes.html and votes.md, from votes.json alone."""

import json
import re
from dataclasses import replace

import pytest

from dpo.common.errors import UserError
from dpo.pages.vote_tables import percent, reviewers, rows
from dpo.pages.votes import headline, markdown, pairs, render, verdict, write_pages
from dpo.voting.figures import figures
from dpo.voting.study import Item, Question
from tests.help.pages import Page, look
from tests.help.simulated import beta, study, vote

EVIL = '</td><script>alert(1)</script><img src="http://x.example/" onerror="x"> | {{ 7 * 6 }} & "'
QUESTIONS = (Question("general", "Which do you prefer?"), Question("appeal", "Which looks better?"))
CHECKS = tuple(Item(f"broken-{n}", "p", "", "broken", (-1, 1), ("x", "y"), ("", "")) for n in range(8))
TRUST = [
    {"scorer": "pick", "majority": 0.72, "interval": [0.64, 0.79], "prompts": 90, "items": 90, "left_out": 10, "votes": 0.61,
     "behind": None, "level": True},
    {"scorer": "clip", "majority": 0.70, "interval": [0.62, 0.77], "prompts": 90, "items": 90, "left_out": 10, "votes": 0.6,
     "behind": [-0.03, 0.07], "level": True},
    {"scorer": "size", "majority": 0.51, "interval": [0.41, 0.6], "prompts": 4, "items": 90, "left_out": 10, "votes": 0.5,
     "behind": None, "level": True},
]  # fmt: skip


def counted(sides=("start", "dpo"), texts=None, **more):
    """The figures of a simulated study with everything that a page can show; `texts` replaces all that users write."""
    declared = study(
        60, sides=sides, questions=QUESTIONS, extra=CHECKS, tie=True, repeats=0.1, note="60 prompts", **more
    )
    given = vote(declared, beta(4, 2), 0, raters=8, ties=0.1, always={"rater 1": "left"})
    named = [replace(item, category="odd" if n % 2 else "even") for n, item in enumerate(declared.items)]
    declared = replace(declared, instructions="Look at both.", notice="May disturb.", items=tuple(named))
    if texts is not None:
        declared = replace(
            declared, title=texts, instructions=texts, notice=texts, note=texts, sides=tuple(f"{s}{texts}" for s in sides),
            questions=tuple(Question(f"{q.key}{texts}", texts) for q in QUESTIONS),
            items=tuple(replace(item, prompt=f"{item.prompt}{texts}", category=texts) for item in named),
        )  # fmt: skip
        given = [replace(one, question=f"{one.question}{texts}", rater=f"{one.rater}{texts}") for one in given]
    found = figures(declared, given)
    scorers = {declared.questions[0].key: [{**one, "scorer": one["scorer"] + (texts or "")} for one in TRUST]}
    return json.loads(json.dumps({**found, "scorers": scorers, "made": {"version": texts or "0.1"}}))


def rate(win_rate, low, high):
    return {"win_rate": win_rate, "interval": [low, high], "ties": 0.1, "prompts": 200, "cases": 200}


def said(*majorities, detectable=0.6):
    """Figures with one pair and a question for each of these majorities (win rate, low, high)."""
    return {
        "questions": [
            {"key": f"q{number}", "pairs": [{
                "base": "start", "other": "dpo", "p": 0.01, "enough": not one[1] <= 0.5 <= one[2],
                "rule": {"majority": rate(*one), "votes": rate(0.58, 0.54, 0.62), "detectable": detectable},
            }]}
            for number, one in enumerate(majorities)
        ],
        "warnings": ["half of the answers took less than 0.3 s"],
    }  # fmt: skip


FOR, AGAINST, OPEN = (0.64, 0.57, 0.71), (0.4, 0.33, 0.47), (0.52, 0.45, 0.59)


@pytest.mark.parametrize(
    ("majorities", "level", "words"),
    [
        ([FOR, FOR], "good", "People prefer dpo to start."),
        ([AGAINST], "poor", "People prefer start to dpo."),
        ([FOR, OPEN], "mixed", "People prefer dpo to start by q0; not enough to tell by the rest."),
        ([OPEN, AGAINST], "poor", "People prefer start to dpo by q1; not enough to tell by the rest."),
        ([FOR, AGAINST], "mixed", "It depends on what is asked whether dpo is preferred to start."),
        ([OPEN], "early", "Not enough to tell whether people prefer dpo or start."),
    ],
)
def test_one_verdict(majorities, level, words):
    found = said(*majorities)
    judged = verdict(found, "start", "dpo")
    assert (judged.level, judged.headline) == (level, words)
    assert headline(found)[-1] == "Be wary: half of the answers took less than 0.3 s"
    for one, sentence in zip(majorities, judged.sentences, strict=False):
        assert f"prefers dpo for {one[0]:.0%} of 200 prompts" in sentence and "it gets 58% of the votes" in sentence
        assert ("not enough to tell" in sentence) == (one is OPEN)


def test_what_could_have_been_shown_is_said():
    assert "a win rate of 60% four times in five" in verdict(said(OPEN), "start", "dpo").sentences[-1]
    assert "ask about more" in verdict(said(OPEN, detectable=None), "start", "dpo").sentences[-1]


def test_rounding_does_not_hide_on_which_side_of_one_half_an_interval_ends():
    assert percent([0.503, 0.72]) == "50.3% to 72.0%"
    assert percent([0.31, 0.499]) == "31.0% to 49.9%"
    assert [percent([0.5, 0.7]), percent([0.45, 0.57])] == ["50% to 70%", "45% to 57%"]


def test_the_table_never_mixes_majorities_and_votes():
    found = counted()
    lines = rows(found)
    assert [(line.question, line.counted) for line in lines] == [
        (key, who) for key in ("general", "appeal") for who in ("by the declared rule", "with everybody")
    ]
    pair = found["questions"][0]["pairs"][0]
    for line, who in zip(lines, ("rule", "everyone"), strict=False):
        assert line.majority.startswith(f"{pair[who]['majority']['win_rate']:.3f} (")
        assert line.votes.startswith(f"{pair[who]['votes']['win_rate']:.3f} (")
    assert [line.p != "" for line in lines] == [True, False] * 2
    table = [line for line in markdown(found).splitlines() if line.startswith("|")]
    assert [line.count("|") for line in table[:6]] == [10] * 6
    everyone = {**found, "left_out": []}
    assert len(rows(everyone)) == 2, "both results are one where nobody is left out"


def test_reviewers_find_what_they_ask():
    found = dict(reviewers(counted()))
    assert found["raters"].startswith("8, of whom the rule leaves out 1;")
    assert (
        found["votes"]
        == "600; wanted for each pair of images and question 5, of the raters that the rule leaves 4 to 5"
    )
    assert (
        found["instructions"] == "Look at both." and found["questions"].splitlines()[1] == "appeal: Which looks better?"
    )
    assert found["exclusion, declared before the first vote"] == "broken: below 75% right"
    assert re.match(r"Krippendorff's nominal alpha 0\.\d\d \(", found["agreement between raters, general"])
    assert re.match(
        r"\d+% \(\d+% to \d+%; \d+ of \d+\); 10% of the votes are asked again", found["agreement with oneself"]
    )
    assert (
        "of these 0 ties" in found["one image shown twice"] and "8 in the study" in found["checks with a broken image"]
    )
    assert "bootstrap over prompts" in found["intervals"] and found["median time of an answer"].endswith(" s")


def test_the_page_stands_alone_and_is_whole():
    page = Page(text := render(counted(("start", "dpo", "dde"))))
    assert "script" not in page.tags and all(ref.startswith(("data:", "#")) for ref in page.refs)
    assert not re.findall(r"url\((?!#)|@import|https?://(?!www\.w3\.org/)", text)
    assert len(page.ids) == len(set(page.ids))
    order = ["A trial", "dpo", "Majority, general", "Votes, general", "What should make you wary", "chose one side",
             "The figures", "never mixed", "with everybody", "How often dpo is preferred to start", "by category",
             "All models on one scale", "0, by definition", "Which scorer to trust", "pick 0.720 (0.640 to 0.790)", "90; 10 without a preference",
             "-0.030 to 0.070: not enough to tell", "too few prompts to tell", "What reviewers ask", "Krippendorff",
             "The raters", "a habit", "Made with"]  # fmt: skip
    places = [page.text.index(part) for part in order]
    assert places == sorted(places)
    assert page.tags.count("svg") == 3 and len(pairs(counted())) == 1


def test_a_question_nobody_voted_on_is_named_and_no_figure_is_made_up():
    declared = study(20, questions=QUESTIONS, sides=("start", "dpo", "dde"))
    general = [one for one in vote(declared, beta(4, 2), 0) if one.question == "general"]
    found = json.loads(json.dumps(figures(declared, general) | {"made": {}}))
    page = Page(render(found)).text
    assert "appeal: dpo against start: no vote" in page and "Majority, appeal" not in page
    assert {line.question for line in rows(found)} == {"general"}


def test_strengths_that_there_are_not_are_said():
    found = counted(("start", "dpo", "dde"))
    for question in found["questions"]:
        question["strengths"] = None
    assert "won or lost all its votes" in Page(render(found)).text


def test_nothing_of_the_users_is_markup():
    found = counted(texts=EVIL)
    page = Page(render(found))
    assert "script" not in page.tags and "img" not in page.tags
    assert all(ref.startswith(("data:", "#")) for ref in page.refs)
    assert "{{ 7 * 6 }}" in page.text
    lines = [line for line in markdown(found).splitlines() if line.startswith("|")]
    widths = [line.count("|") for line in lines]
    assert widths == [10] * 6 + [7] * 5 + [3] * (len(lines) - 11)
    assert "<" not in markdown(found) and all("\n" not in line for line in headline(found))


@pytest.mark.long
def test_a_browser_shows_it(tmp_path):
    for width, columns in ((360, 1), (1200, 3)):
        seen, console = look(render(counted(("start", "dpo", "dde"))), tmp_path, width)
        assert console == [] and seen["overflow"] == 0 and seen["columns"] == columns and seen["text"] >= 11


def test_written_beside_the_figures(tmp_path):
    path = tmp_path / "votes.json"
    path.write_text(json.dumps(counted()))
    assert [made.name for made in write_pages(path)] == ["votes.html", "votes.md"]
    for text in ("", "[]", "{}", '{"questions": [{}]}', "{" * 100_000):
        path.write_text(text)
        with pytest.raises(UserError, match="run python -m dpo.vote with --report again"):
            write_pages(path)
