"""dpo.vote --report: what lies in the folder afterwards, and what the console says."""

import json
from dataclasses import asdict, replace

import pytest

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.voting import answers, report, study
from dpo.voting.study import Item
from tests.help.simulated import beta, vote
from tests.help.simulated import study as declared_study

CHECKS = tuple(Item(f"broken-{n}", "p", "", "broken", (-1, 1), ("x", "y"), ("", "")) for n in range(8))


def keep(folder, declared, given):
    folder.mkdir(exist_ok=True)
    study.write(folder, declared)
    (folder / answers.FILE).write_text("".join(json.dumps(asdict(one)) + "\n" for one in given))
    return folder


@pytest.fixture
def folder(tmp_path):
    declared = declared_study(80, extra=CHECKS)
    given = vote(declared, beta(4, 2), 0, raters=8, always={"rater 1": "left"})
    return keep(
        tmp_path / "study", declared, [replace(one, rater=one.rater.replace("rater", "Grace")) for one in given]
    )


def test_a_report_says_who_is_who_on_the_console_alone(folder):
    made = report.make(folder)
    assert made.page == folder / "votes.html" and made.page.is_file()
    assert made.lines[0].startswith("People prefer dpo to start. general: the majority of raters prefers dpo for ")
    (who,) = [line for line in made.lines if "Grace 1" in line]
    assert "checks with a broken image right" in who and "chooses one side" in who
    for name in ("votes.html", "votes.md", "votes.json"):
        assert "Grace" not in (folder / name).read_text(encoding="utf-8")


def test_it_says_which_files_it_was_made_from_and_comes_out_the_same(folder):
    report.make(folder)
    before = {name: (folder / name).read_bytes() for name in ("votes.html", "votes.md", "votes.json")}
    made = json.loads(before["votes.json"])["made"]
    assert (made["answers"], made["study"]) == (checksum(folder / "answers.jsonl"), checksum(folder / "study.json"))
    report.make(folder)
    assert before == {name: (folder / name).read_bytes() for name in before}


def test_an_answer_that_comes_while_it_is_made_is_in_the_figures_and_in_the_checksum(folder, monkeypatch):
    path, read, late = folder / "answers.jsonl", answers.read, []

    def slowly(place):
        given = read(place)
        if not late:
            late.append(replace(given[0], id="late", rater="Late"))
            with path.open("a") as file:
                file.write(json.dumps(asdict(late[0])) + "\n")
        return given

    monkeypatch.setattr(answers, "read", slowly)
    report.make(folder)
    found = json.loads((folder / "votes.json").read_text())
    assert found["made"]["answers"] == checksum(path) and len(found["raters"]) == 9


def test_scores_stand_beside_the_people(folder, tmp_path):
    declared = study.read(folder)
    table = tmp_path / "scores.csv"
    table.write_text("file,score\n" + "".join(f"a{n}.png,0\nb{n}.png,{n % 3 - 1}\n" for n in range(80)))
    report.make(folder, scores=[f"mine={table}"])
    (one,) = json.loads((folder / "votes.json").read_text())["scorers"]["general"]
    assert one["scorer"] == "mine" and one["items"] + one["left_out"] == 80 and len(declared.items) == 88
    assert "Which scorer to trust" in (folder / "votes.html").read_text(encoding="utf-8")


def test_without_votes_there_is_no_report(tmp_path):
    declared = declared_study(4, extra=CHECKS)
    only_checks = [one for one in vote(declared, beta(4, 2), 0) if one.item.startswith("broken")]
    for given in ([], only_checks):
        folder = keep(tmp_path / "study", declared, given)
        with pytest.raises(UserError, match="has no vote yet: ask people with python -m dpo.vote"):
            report.make(folder)
        assert not (folder / "votes.json").exists()
    with pytest.raises(UserError, match="declare a study"):
        report.make(tmp_path)
