"""dpo.common.tokenizers: equal for equal words and cutting, another for others."""

import shutil

from transformers import AutoTokenizer

from dpo.common.tokenizers import tokenizer_digest
from tests.help.towers import TOKENIZER, swap_two_words


def digest(folder, length=77):
    return tokenizer_digest(AutoTokenizer.from_pretrained(folder), length)


def test_equal_words_are_equal_and_two_that_changed_places_are_not(tmp_path):
    other = tmp_path / "other"
    shutil.copytree(TOKENIZER, other)
    assert digest(other) == digest(TOKENIZER) != digest(TOKENIZER, 7)
    swap_two_words(other)
    assert digest(other) != digest(TOKENIZER)
