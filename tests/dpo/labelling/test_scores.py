"""A number for every image: scored once, in whole batches, the same however often it was interrupted; tables beside."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dpo.common.errors import UserError
from dpo.common.pictures import pixel_hash
from dpo.data.pairs import ImageRef
from dpo.evaluating import sides
from dpo.evaluating.scoring import BATCH
from dpo.labelling.items import Item, OfSides
from dpo.labelling.scores import of_table, scored
from dpo.scorers.cache import ScoreCache
from tests.help.judges import Together
from tests.help.labelling import images_of


def picture(shade):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (shade, shade, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def items(shades, captions=("a fox",)):
    return [
        Item(captions[i % len(captions)], ImageRef(f"uid {i}", data=picture(shade))) for i, shade in enumerate(shades)
    ]


class Counting:
    """The red of an image; keeps how many images it saw each time. Not finite above `most`."""

    name, fingerprint = "counting", "counting 1"

    def __init__(self, stop=None, most=255):
        self.calls, self.stop, self.most = [], stop, most

    def score(self, *, images, captions):
        if self.stop == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append([(image.getpixel((0, 0))[0], text) for image, text in zip(images, captions, strict=True)])
        return torch.tensor([float(red) if red <= self.most else float("nan") for red, _ in self.calls[-1]])


@pytest.fixture
def cache(tmp_path):
    with ScoreCache(tmp_path / "scores.sqlite") as found:
        yield found


def score(found, scorer, cache, places=None):
    return scored(found, scorer, cache, lambda done, of: None, places or range(len(found)))


def test_an_image_and_caption_is_scored_once_and_every_batch_is_whole(cache):
    shades, scorer = [i % 40 for i in range(200)], Counting()
    assert score(items(shades), scorer, cache).tolist() == shades
    assert [len(call) for call in scorer.calls] == [BATCH] * 3 and len(
        {one for call in scorer.calls for one in call}
    ) == 40
    again = Counting()
    assert score(items(shades), again, cache).tolist() == shades and again.calls == []
    other = Counting()
    score(items(shades, ("a fox", "a boat")), other, cache)
    assert {text for call in other.calls for _, text in call} == {"a boat"}, "another caption is another score"


def test_stopped_and_gone_on_the_batches_are_the_same(cache, tmp_path):
    """By a scorer whose numbers tell what was scored together."""
    found = items(range(100))
    whole = score(found, Together(), cache)
    with ScoreCache(tmp_path / "other.sqlite") as other:
        for stop in (1, 2, 1):
            together, left = Together(), [stop]

            def stopping(*, images, captions, together=together, left=left):
                if not left[0]:
                    raise KeyboardInterrupt
                left[0] -= 1
                return Together.score(together, images=images, captions=captions)

            together.score = stopping
            with pytest.raises(KeyboardInterrupt):
                score(found, together, other)
        assert (score(found, Together(), other) == whole).all()


def test_parts_have_the_scores_of_the_whole(cache, tmp_path):
    found = items(range(90))
    whole = score(found, Counting(), cache)
    with ScoreCache(tmp_path / "other.sqlite") as other:
        first, second = (score(found, Counting(), other, part) for part in (range(45), range(45, 90)))
    assert np.isnan(first[45:]).all() and np.isnan(second[:45]).all()
    assert (np.where(np.isnan(first), second, first) == whole).all()


def test_what_has_no_score_is_said_once_and_is_not_a_number(cache, caplog):
    found = items(range(40))
    found[3] = Item("a fox", ImageRef("bad", data=b"no image"))
    found[5] = Item("a fox", ImageRef("gone", path="/nowhere.png"))
    values = score(found, Counting(most=30), cache)
    assert np.flatnonzero(np.isnan(values)).tolist() == [3, 5, *range(31, 40)]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "11 of 40 images have no score, and their pairs are left out; the first: image bad: " in line


def test_images_of_another_size_than_the_judges(cache, caplog):
    scorer = Counting()
    scorer.size = (64, 64)
    assert np.isnan(score(items(range(3)), scorer, cache)).all() and scorer.calls == []
    assert "counting judges images of 64 x 64 pixels, not 8 x 8" in caplog.text


def test_a_scorer_that_gives_too_few_numbers_is_one_line(cache):
    scorer = Counting()
    scorer.score = lambda *, images, captions: torch.ones(3)
    with pytest.raises(UserError, match=r"counting gave \(3,\) scores for 16 images"):
        score(items(range(3)), scorer, cache)


def test_a_table_names_images_by_uid_file_or_hash(tmp_path, caplog):
    found = items(range(4))
    (tmp_path / "pictures").mkdir()
    path = tmp_path / "pictures" / "x.png"
    path.write_bytes(picture(9))
    found.append(Item("a fox", ImageRef("other", path=str(path))))
    hashed = pixel_hash(Image.open(io.BytesIO(picture(2))))
    (tmp_path / "t.csv").write_text(f"file,hash,score\nuid 0,,1.5\npictures/x.png,,2.5\n,{hashed},3.5\nuid 1,,nan\n")
    values = of_table(found, "mine", tmp_path / "t.csv")
    np.testing.assert_equal(values, [1.5, np.nan, 3.5, np.nan, 2.5])
    assert "mine: 2 of 5 images have no score" in caplog.text
    (tmp_path / "none.csv").write_text("file,score\nelse,1\n")
    with pytest.raises(UserError, match=r"none.csv has no score for any image; the first, image uid 0 is not in"):
        of_table(found, "mine", tmp_path / "none.csv")


def test_a_row_that_names_files_of_two_models_is_refused(tmp_path):
    """Each model's files are called 000.png, 001.png, ...: a bare name says nothing of the model."""
    drawn = OfSides([sides.of_table(name, images_of(tmp_path / name, 2, 1), None) for name in ("base", "other")])
    table = tmp_path / "t.csv"
    table.write_text("file,score\n000.png,1\n001.png,2\n")
    with pytest.raises(
        UserError, match=r"t.csv, row 1: names both .*base/000.png and .*other/000.png: give paths with the folder"
    ):
        of_table(drawn, "mine", table)
    table.write_text("file,score\nbase/000.png,1\nbase/001.png,2\nother/000.png,3\nother/001.png,4\n000.png,9\n")
    assert of_table(drawn, "mine", table).tolist() == [1, 2, 3, 4]
    alone = OfSides(drawn.sides[:1])
    table.write_text("file,score\n000.png,1\n001.png,2\n")
    assert of_table(alone, "mine", table).tolist() == [1, 2]
