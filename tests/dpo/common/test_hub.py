"""dpo.common.hub: what a name on the hub looks like."""

import pytest

from dpo.common.hub import is_hub_id, reason


@pytest.mark.parametrize("name", ["owner/name", "a/b", "stabilityai/stable-diffusion-2-1", "_o.w-n/n.a_m-e", "0/.x"])
def test_names_on_the_hub(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["name", "./name", "../name", ".hidden/name", "/owner/name", "a/b/c", "a b/c", "owner/", "", "a/b\n"]
)
def test_what_is_none(name):
    assert not is_hub_id(name)


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "Cannot find a snapshot and outgoing traffic has been disabled. Pass 'local_files_only=False' as input.",
            "not in the cache of the hub",
        ),
        ("404: there is no such repository\nat all", "404: there is no such repository"),
        ("a word " * 100, " ..."),
    ],
)
def test_a_reason_is_in_a_few_words_of_ones_own(said, words):
    found = reason(OSError(said))
    assert words in found and len(found) < 170 and "\n" not in found and "local_files_only" not in found
