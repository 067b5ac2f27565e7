"""Markdown from texts that may say anything."""

import pytest

from dpo.pages.markdown import cell, table


def test_a_table():
    assert table(("a", "b"), [("1", "2"), ("3", "")]) == "| a | b |\n| --- | --- |\n| 1 | 2 |\n| 3 |  |"
    assert table(("a", "b"), []) == "", "no head without lines"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a | b", "a &#124; b"), ("<b>&amp;", "&#60;b&#62;&#38;amp;"), ("two\nlines\there", "two lines here"),
     ("[x](y)", "&#91;x&#93;(y)"), ("`*\\", "&#96;&#42;&#92;"), ("\x1b[31mred", "&#92;x1b&#91;31mred")],
)  # fmt: skip
def test_a_cell_is_text_on_one_line(text, expected):
    assert cell(text) == expected
