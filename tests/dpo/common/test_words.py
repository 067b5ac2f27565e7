"""dpo.common.words: words for messages."""

from dpo.common.words import first_line


def test_the_first_line_of_an_error():
    assert first_line(ValueError("  one\ntwo")) == "one"
    assert first_line(ValueError("\n\none\n")) == "one"
    assert first_line(ValueError("x" * 1000)) == "x" * 300
    assert first_line(KeyError()) == "KeyError"
