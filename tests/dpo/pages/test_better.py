"""dpo.pages.better: one verdict on a side, and what could have been shown."""

import pytest

from dpo.pages.better import verdict
from tests.help.evaluations import entry, evaluation, paired

WORSE, NONE = paired((0.4, 0.35, 0.45), (-0.4, -0.5, -0.3)), paired((0.51, 0.46, 0.55), (0.01, -0.1, 0.1))


@pytest.mark.parametrize(
    ("results", "level", "words"),
    [
        ([entry()], "good", "dpo is better than start"),
        ([entry(paired=WORSE)], "poor", "dpo is worse than start"),
        ([entry(paired=NONE, p=0.7)], "early", "No difference between dpo and start can be shown"),
        ([entry(p=0.12)], "early", "dpo and start may differ by pickscore, but that is not shown"),
        ([entry(paired=NONE, p=0.039)], "early", "dpo and start may differ by pickscore, but that is not shown"),
        ([entry(paired=paired((0.51, 0.46, 0.55), (0.118, 0.046, 0.208)), p=0.3)], "early", "may differ by pickscore"),
        (
            [entry(paired=WORSE), entry("hpsv2.1", paired=NONE, p=1.0)],
            "mixed",
            "worse than start by pickscore; the rest",
        ),
        ([entry(), entry("hpsv2.1", paired=WORSE)], "mixed", "The scorers disagree on dpo"),
        ([entry(), entry("hpsv2.1", paired=NONE, p=0.7)], "mixed", "better than start by pickscore; the rest"),
    ],
)
def test_one_verdict(results, level, words):
    found = verdict(evaluation(*results), "dpo")
    assert found.level == level and words in found.headline
    assert all(str(f"{one['paired']['win_rate']:.0%}") in " ".join(found.sentences) for one in results)


def test_what_could_have_been_shown_is_said():
    assert "a win rate of 56% four times in five" in " ".join(verdict(evaluation(entry(paired=NONE)), "dpo").sentences)


@pytest.mark.parametrize(("one", "said"), [
    (entry(paired=paired((0.47, 0.4, 0.55), (0.118, 0.046, 0.208)), p=0.27),
     "By pickscore the interval of the mean difference in score alone says so."),
    (entry(p=0.12), "the interval of the win rate and the interval of the mean difference in score alone say so."),
    (entry(paired=NONE, p=0.039), "By pickscore the sign test alone says so."),
])  # fmt: skip
def test_what_alone_says_that_they_differ_is_named(one, said):
    assert said in " ".join(verdict(evaluation(one), "dpo").sentences)
