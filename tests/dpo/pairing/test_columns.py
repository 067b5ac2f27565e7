"""Which column is what: usual names in any spelling, near misses named, and no guess where a name says nothing."""

import pytest

from dpo.common.errors import UserError
from dpo.pairing.columns import Named, find, higher_is_better


def test_names_are_found_in_any_spelling():
    found = find(["File Name", "STARS", "Prompt", "note", "Prompt-ID"], Named(), "t.csv")
    assert (found.image, found.number, found.prompt, found.group) == ("File Name", "STARS", "Prompt", "Prompt-ID")
    assert not found.of_matches and "image from 'File Name', number from 'STARS'" in found.said()
    found = find(["winner", "loser", "draw", "caption"], Named(), "t.csv")
    assert found.of_matches and (found.winner, found.loser, found.tie) == ("winner", "loser", "draw")
    found = find(["a", "b", "c"], Named(image="a", number="B", group="c"), "t.csv")
    assert (found.image, found.number, found.group, found.prompt) == ("a", "b", "c", None)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (
            ["pictur", "rank"],
            "no column of the image (image, file, file_name, filename, path, image_path, picture, img), found pictur, rank: "
            "'pictur' looks like it: rename it, or",
        ),
        (["image", "scor"], "'scor' looks like it: rename it, or name it with --value-column"),
        (
            ["image", "x"],
            "no column of a number (rank, score, stars or another), found image, x: name it with --value-column",
        ),
        (["winner", "looser"], "'looser' looks like it: rename it, or name it with --rejected-column"),
        (["image", "rank", "score"], "has score, rank: say with --value-column"),
        (["image", "Image", "score"], "two columns are called 'image'"),
        (
            ["prompt", "chosen", "rejected"],
            "holds pairs already: train with --data t.csv; python -m dpo.pairs --check t.csv looks at",
        ),
        (["caption", "jpg_0", "jpg_1", "label_0"], "holds pairs already"),
        (["image", "score", "winner", "loser"], "matches too"),
    ],
)
def test_what_is_wrong_is_said_with_what_to_do(names, words):
    with pytest.raises(UserError) as error:
        find(names, Named(), "t.csv")
    assert words in str(error.value) and "\n" not in str(error.value)


def test_a_named_column_must_be_there():
    with pytest.raises(UserError, match="--value-column points: there is image, score"):
        find(["image", "score"], Named(number="points"), "t.csv")


def test_a_column_of_the_other_kind_of_table_is_refused():
    with pytest.raises(UserError, match="holds images with a number, no matches: leave --chosen-column out"):
        find(["image", "score", "x"], Named(winner="x"), "t.csv")
    with pytest.raises(UserError, match="holds matches, no images with a number: leave --value-column out"):
        find(["winner", "loser", "x"], Named(number="x"), "t.csv")


def test_a_direction_is_known_asked_or_refused():
    assert higher_is_better("score", None, 0, 1) and not higher_is_better("Place", None, 1, 4)
    assert not higher_is_better("score", False, 0, 1) and higher_is_better("rank", True, 1, 4)
    for name in ("rank", "my number"):
        with pytest.raises(
            UserError, match=r"runs from 1 to 4.* --lower-is-better \(1 is best\) or --higher-is-better \(4"
        ):
            higher_is_better(name, None, 1, 4)
