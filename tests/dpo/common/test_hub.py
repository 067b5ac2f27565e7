"""dpo.common.hub: what a name on the hub looks like."""

import pytest
from huggingface_hub import errors

from dpo.common.hub import KINDS, NO_FILE, NOT_ASKED, UNREACHED, is_hub_id, reason


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


def raised(kind, said="a text that names the client's own arguments"):
    """An error of the client's, without the answer of a server that it is usually made of."""
    error = kind.__new__(kind)
    error.args = (said,)
    return error


def wrapped(cause):
    """As diffusers and transformers hand it on."""
    error = OSError("We couldn't connect to 'https://huggingface.co' to load the files")
    error.__cause__ = cause
    return error


MEANT = [
    (errors.OfflineModeIsEnabled, NOT_ASKED),
    (errors.GatedRepoError, KINDS["GatedRepoError"]),
    (errors.RepositoryNotFoundError, KINDS["RepositoryNotFoundError"]),
    (errors.RevisionNotFoundError, KINDS["RevisionNotFoundError"]),
    (errors.EntryNotFoundError, NO_FILE),
    (errors.LocalEntryNotFoundError, UNREACHED),
    (ConnectionResetError, UNREACHED),
]


@pytest.mark.parametrize("through", [lambda error: error, wrapped])
@pytest.mark.parametrize(("kind", "meant"), MEANT)
def test_not_found_gated_not_reached_and_not_asked_are_told_apart(kind, meant, through):
    assert reason(through(raised(kind))) == meant


def test_a_hub_that_was_asked_in_vain_is_not_one_that_is_not_asked():
    asked = raised(
        errors.LocalEntryNotFoundError, "outgoing traffic has been disabled: set 'local_files_only' to False"
    )
    assert reason(asked) == NOT_ASKED
    asked.__context__ = ConnectionRefusedError("refused")  # a library tried its cache after that
    assert reason(asked) == UNREACHED


def test_a_long_reason_ends_with_a_whole_word():
    words = reason(ValueError("gradually " * 40)).split()
    assert set(words) == {"gradually", "..."}
