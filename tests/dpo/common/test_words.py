"""dpo.common.words: words for messages."""

from dpo.common.words import (
    LISTED,
    SHOWN,
    as_on_windows,
    counted,
    counted_of,
    excerpt,
    excerpt_of_path,
    first_line,
    listed,
    multiples,
    printable,
)


def test_the_first_line_of_an_error():
    assert first_line(ValueError("  one\ntwo")) == "one"
    assert first_line(ValueError("\n\none\n")) == "one"
    assert first_line(ValueError("x" * 1000)) == "x" * 300 + " ..."
    assert set(first_line(ValueError("word " * 200)).split()) == {"word", "..."}
    assert first_line(KeyError()) == "KeyError"


def test_no_message_repeats_a_long_cell():
    for value in ("x" * 10_000, b"x" * 10_000, {"bytes": "x" * 10_000}, ["x" * 10_000], 10**200):
        assert len(excerpt(value)) < SHOWN + 30 and "\n" not in excerpt(value)
    assert excerpt("a\nb") == "'a\\nb'" and excerpt(None) == "None" and excerpt(3) == "3"
    assert len(excerpt_of_path("x" * 10_000)) == SHOWN + 3 and excerpt_of_path("a/b.jpg") == "a/b.jpg"
    assert excerpt_of_path("a/\ud800\udcff.jpg") == r"a/\ud800\udcff.jpg"


def test_names_are_listed_within_limits():
    assert listed(["a", "b"]) == "a, b"
    assert listed(["x" * 1000]) == "x" * SHOWN + "..."
    assert listed(map(str, range(50))).endswith(f", {LISTED - 1} and {50 - LISTED} more")


def test_text_of_a_data_set_does_not_drive_a_terminal():
    assert printable("\x1b[2J\x1b]0;owned\x07 a\rb\x9bm") == "\\x1b[2J\\x1b]0;owned\\x07 a\\rb\\x9bm"
    assert printable("\u202egpj.exe\ud800\x7f") == "\\u202egpj.exe\\ud800\\x7f"
    plain = "größe 漢字 🦊\tone\ntwo — ‘x’"
    assert printable(plain) == plain


def test_a_number_and_what_it_counts():
    assert [counted(n, "image is", "images are") for n in (0, 1, 2)] == [
        "0 images are",
        "1 image is",
        "2 images are",
    ]
    assert [counted(n, "pair", "pairs", ",") for n in (1, 2000)] == ["1 pair", "2,000 pairs"]


def test_some_of_a_number_and_what_they_do():
    assert [counted_of(some, of, "images", "is", "are") for some, of in ((1, 1), (1, 5), (2, 5))] == [
        "1 of 1 image is",
        "1 of 5 images is",
        "2 of 5 images are",
    ]


def test_a_path_of_windows_has_a_hint_elsewhere(monkeypatch):
    assert as_on_windows("a/b") == ""
    assert as_on_windows("a\\b") == "; it is written with \\, as on Windows: write / here"
    monkeypatch.setattr("os.sep", "\\")
    assert as_on_windows("a\\b") == ""


def test_the_multiples_beside_a_number():
    assert multiples(16, 1000) == "multiples of 16: 992 or 1008"
    assert multiples(16, 8) == "multiples of 16: 16"
