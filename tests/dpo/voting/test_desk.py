"""A study in progress: nothing is lost, nothing counts twice, and nobody holds up the others."""

import json

import pytest

from dpo.voting import raters
from dpo.voting.answers import Journal, Undo, read
from dpo.voting.asking import Tally
from dpo.voting.desk import AWAY, MOST_CODES, Desk, Refused
from tests.help.votes import answered, imagined

SECRET = b"secret"


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def opened(tmp_path):
    """Opens a desk on the folder, as a server that starts does."""
    journals = []

    def open_(study, **options):
        while journals:
            journals.pop().__exit__(None, None, None)
        journals.append(Journal(tmp_path))
        return Desk(study, SECRET, journals[-1], **options)

    yield open_
    while journals:
        journals.pop().__exit__(None, None, None)


def come(desk, name, link=""):
    reply = desk.enter(link, name)
    return reply["rater"], reply["key"]


def test_a_study_that_is_full_still_takes_those_it_knows(opened, monkeypatch):
    """Who types the name again, on another device, goes on."""
    monkeypatch.setattr("dpo.voting.desk.MOST_RATERS", 1)
    desk = opened(imagined(8))
    anna = come(desk, "Anna")
    assert come(desk, "anna") == anna
    with pytest.raises(Refused, match="this study has 1 raters and takes no more"):
        come(desk, "Ben")


def test_an_answer_counts_once_however_often_it_is_sent(opened, tmp_path):
    desk = opened(imagined(8, repeats=0.0))
    me = come(desk, "Anna")
    first = desk.following(*me)
    said = answered(first, 1)
    second = desk.answer(*me, said)
    assert desk.answer(*me, said) == second == desk.following(*me)
    assert desk.answer(*me, {**said, "choice": "right"}) == second  # a resend that was altered changes nothing
    assert (second["done"], second["last"]) == (1, said["id"])
    assert desk.answer(*me, {**said, "id": f"{2:032x}"}) == second  # another tab's answer to the same question
    assert [one.id for one in read(tmp_path)] == [said["id"]]


def test_the_same_is_asked_until_it_is_answered(opened):
    desk = opened(imagined(8))
    me = come(desk, "Anna")
    first = desk.following(*me)
    assert desk.following(*me) == first and first["state"] == "question"
    ahead = first["ahead"]
    second = desk.answer(*me, answered(first, 1))
    assert second["question"]["images"] == ahead  # what was loaded ahead is what comes


def test_sides_are_taken_out_of_the_answer(opened, tmp_path):
    desk = opened(imagined(30, votes=3))
    for name in "AB":
        me, number = come(desk, name), ord(name) * 1000
        reply = desk.following(*me)
        while reply["state"] == "question":
            asked = desk._held[name][0]
            for place, which in enumerate((asked.left, 1 - asked.left)):
                item, shown = desk.image(
                    reply["question"]["images"][place].removeprefix("/image/").removesuffix(".png")
                )
                assert (item.id, shown) == (asked.item, which)
            number += 1
            choice = ("left", "right", "tie")[number % 3]
            reply = desk.answer(*me, answered(reply, number, choice))
            last = desk.tally.given[name][-1]
            expected = {
                "left": ("first", "second")[asked.left],
                "right": ("second", "first")[asked.left],
                "tie": "tie",
            }[choice]
            assert (last.choice, last.left, last.repeat, last.item) == (expected, asked.left, asked.repeat, asked.item)
    assert {one.choice for one in read(tmp_path)} == {"first", "second", "tie"} and any(
        one.repeat for one in read(tmp_path)
    )


def test_undo_asks_again_and_is_a_later_line(opened, tmp_path):
    desk = opened(imagined(8))
    me = come(desk, "Anna")
    first = desk.following(*me)
    second = desk.answer(*me, answered(first, 1))
    third = desk.answer(*me, answered(second, 2))
    back = desk.undo(*me, third["last"])
    assert back["question"] == second["question"] and (back["done"], back["last"]) == (1, f"{1:032x}")
    assert desk.undo(*me, third["last"]) == back  # a resend
    assert desk.answer(*me, answered(second, 2)) == back  # the undone answer's own resend does not come back
    again = desk.undo(*me, back["last"])
    assert again["question"] == first["question"] and again["last"] is None and again["done"] == 0
    desk.answer(*me, answered(again, 3, "right"))
    assert [one.id for one in read(tmp_path)] == [f"{3:032x}"]
    lines = (tmp_path / "answers.jsonl").read_text("utf-8").splitlines()
    assert [("undo" in json.loads(line)) for line in lines] == [False, False, True, True, False]


def test_undo_of_what_is_not_the_last_changes_nothing(opened, tmp_path):
    desk = opened(imagined(8))
    me, other = come(desk, "Anna"), come(desk, "Ben")
    reply = desk.answer(*me, answered(desk.following(*me), 1))
    now = desk.answer(*me, answered(reply, 2))
    assert desk.undo(*me, f"{1:032x}") == now  # another tab went on
    for who, id in ((me, f"{9:032x}"), (other, f"{1:032x}")):
        with pytest.raises(Refused, match="no such answer of yours") as error:
            desk.undo(*who, id)
        assert error.value.status == 404
    assert len(read(tmp_path)) == 2


def test_a_server_that_starts_again_knows_all_that_was_kept(opened, tmp_path):
    study = imagined(20)
    desk = opened(study)
    me = come(desk, "Anna")
    reply = desk.following(*me)
    for number in range(7):
        reply = desk.answer(*me, answered(reply, number, ("left", "right")[number % 2]))
    said = answered(reply, 7)
    anew = opened(study)  # killed between the click and the answer
    assert come(anew, "anna") == me  # the same person, however the name is spelt
    assert anew.answer(*me, said)["done"] == 8  # asked by the server before
    assert anew.answer(*me, said)["done"] == 8
    desk = opened(study)
    assert desk.answer(*me, said)["done"] == 8 and len(read(tmp_path)) == 8
    assert vars(desk.tally)["votes"] == Tally(study, read(tmp_path)).votes


def test_what_others_hold_is_given_back_when_they_are_away(opened):
    clock = Clock()
    desk = opened(imagined(2, checks=0, repeats=0.0, votes=1), clock=clock)
    one, two = come(desk, "Anna"), come(desk, "Ben")
    first = desk.following(*one)
    assert first["state"] == "question" and len(first["ahead"]) == 2
    assert desk.following(*two)["state"] == "wait"
    clock.now = AWAY + 1
    theirs = desk.following(*two)
    assert theirs["state"] == "question"
    assert desk.following(*one)["state"] == "wait"  # who was away has nothing that others hold now
    desk.answer(*one, answered(first, 1))  # but an answer that comes late is kept
    reply = desk.following(*two)
    reply = desk.answer(*two, answered(reply, 2))
    assert reply["state"] == "done" and sum(desk.tally.votes.values()) == 2
    assert desk.following(*one)["state"] == "done"


def test_many_raters_at_once_give_no_more_votes_than_wanted(opened):
    desk = opened(imagined(10, checks=1, repeats=0.1, votes=3))
    people = [come(desk, f"rater {number}") for number in range(12)]
    replies = {me: desk.following(*me) for me in people}
    number = 0
    while open_ := [me for me, reply in replies.items() if reply["state"] == "question"]:
        for me in open_:
            number += 1
            replies[me] = desk.answer(*me, answered(replies[me], number))
        for me, reply in replies.items():
            if reply["state"] == "wait":
                replies[me] = desk.following(*me)
    assert {reply["state"] for reply in replies.values()} == {"done"}
    assert set(desk.tally.votes.values()) == {3} and len(desk.tally.votes) == 10
    assert all(abs(3 - 2 * desk.tally.lefts[key]) == 1 for key in desk.tally.votes)  # they all answered what they held


def test_nothing_tells_a_model_a_check_or_a_repeat(opened):
    desk = opened(imagined(20, repeats=0.3))
    me = come(desk, "Anna")
    reply, number, seen = desk.following(*me), 0, set()
    while reply["state"] == "question":
        held, number = desk._held["Anna"][0], number + 1
        seen.add((desk.tally.kinds[held.item], held.repeat))
        assert sorted(reply) == ["ahead", "done", "last", "left", "question", "state"]
        assert sorted(reply["question"]) == ["images", "item", "prompt", "question", "text", "ticket"]
        assert (
            "base" not in json.dumps(reply)
            and "new" not in json.dumps(reply)
            and len(reply["question"]["ticket"]) == 32
        )
        reply = desk.answer(*me, answered(reply, number))
    assert len(seen) == 4


@pytest.mark.parametrize(
    ("change", "status"),
    [
        ({"id": "1"}, 400),
        ({"id": "G" * 32}, 400),
        ({"seconds": -1}, 400),
        ({"seconds": float("nan")}, 400),
        ({"seconds": 1e9}, 400),
        ({"item": "vote99"}, 404),
        ({"question": "z"}, 404),
        ({"choice": "first"}, 400),
        ({"choice": "tie"}, 400),
        ({"ticket": "0" * 32}, 403),
        ({"ticket": "é"}, 403),
    ],
)
def test_what_was_not_asked_is_refused(opened, tmp_path, change, status):
    desk = opened(imagined(8, tie=False))
    me = come(desk, "Anna")
    reply = desk.following(*me)
    with pytest.raises(Refused) as error:
        desk.answer(*me, {**answered(reply, 1), **change})
    assert error.value.status == status and "\n" not in str(error.value)
    assert read(tmp_path) == [] and desk.following(*me) == reply


def test_a_ticket_is_one_raters_own(opened, tmp_path):
    desk = opened(imagined(8))
    anna, ben = come(desk, "Anna"), come(desk, "Ben")
    said = answered(desk.following(*anna), 1)
    with pytest.raises(Refused, match="not asked of you"):
        desk.answer(*ben, said)
    for who in (("Ben", anna[1]), ("nobody", ""), ("Anna", "é")):
        with pytest.raises(Refused, match="unknown rater"):
            desk.answer(*who, said)
    desk.answer(*anna, said)
    with pytest.raises(Refused, match="belongs to another answer") as error:
        desk.answer(*ben, {**answered(desk.following(*ben), 1)})
    assert error.value.status == 409 and [one.rater for one in read(tmp_path)] == ["Anna"]


def test_names_links_and_the_link_of_all(opened):
    study = imagined(8)
    desk = opened(study)
    assert desk.enter("", "")["rater"] is None and desk.enter("whatever", "Anna")["rater"] == "Anna"
    assert desk.enter("", "ANNA")["rater"] == "Anna"
    with pytest.raises(Refused, match="a name has 1 to 60"):
        desk.enter("", "\x1b")
    everybody = raters.key_of_all(SECRET)
    desk = opened(study, closed=True)
    for link in ("", "é", everybody[:-1]):
        with pytest.raises(Refused, match="open by link alone"):
            desk.enter(link, "Anna")
    assert desk.enter(everybody, "")["rater"] is None and desk.enter(everybody, "Anna")["rater"] == "Anna"
    desk = opened(study, closed=True, invited=["Anna", "Ben"])
    for link in ("", everybody):
        with pytest.raises(Refused, match="by personal link alone"):
            desk.enter(link, "Anna")
    reply = desk.enter(raters.key_of(SECRET, "Ben"), "Anna")
    assert reply["rater"] == "Ben"
    with pytest.raises(Refused, match="unknown rater"):  # came in before there were invitations
        desk.following("Cleo", raters.key_of(SECRET, "Cleo"))


def test_an_answer_that_cannot_be_written_does_not_count(opened, tmp_path, monkeypatch):
    desk = opened(imagined(8))
    me = come(desk, "Anna")
    reply = desk.following(*me)

    def full(line):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(desk._journal, "add", full)
    with pytest.raises(OSError, match="Input/output"):
        desk.answer(*me, answered(reply, 1))
    monkeypatch.undo()
    assert desk.following(*me) == reply
    after = desk.answer(*me, answered(reply, 1))
    monkeypatch.setattr(desk._journal, "add", full)
    with pytest.raises(OSError, match="Input/output"):
        desk.undo(*me, after["last"])
    monkeypatch.undo()
    assert desk.following(*me) == after and len(read(tmp_path)) == 1


def test_addresses_that_are_valid_are_bounded(opened, monkeypatch):
    monkeypatch.setattr("dpo.voting.desk.MOST_CODES", 10)
    assert MOST_CODES > 10
    desk = opened(imagined(8))
    first = desk.following(*come(desk, "Anna"))["question"]["images"][0]
    code = first.removeprefix("/image/").removesuffix(".png")
    assert desk.image(code)
    for number in range(4):
        desk.following(*come(desk, f"rater {number}"))
    with pytest.raises(Refused, match="no image is here"):
        desk.image(code)
    assert len(desk._codes) == 10


def test_undo_lines_of_the_file_are_heeded_at_the_start(opened, tmp_path):
    desk = opened(imagined(8))
    me = come(desk, "Anna")
    reply = desk.answer(*me, answered(desk.following(*me), 1))
    desk.undo(*me, reply["last"])
    desk = opened(imagined(8))
    assert isinstance(desk._journal.lines[-1], Undo) and desk.following(*me)["done"] == 0
