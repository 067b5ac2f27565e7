"""dpo.common.hub: what a name on the hub looks like."""

import pytest

from dpo.common.hub import is_hub_id


@pytest.mark.parametrize("name", ["owner/name", "a/b", "stabilityai/stable-diffusion-2-1", "_o.w-n/n.a_m-e", "0/.x"])
def test_names_on_the_hub(name):
    assert is_hub_id(name)


@pytest.mark.parametrize(
    "name", ["name", "./name", "../name", ".hidden/name", "/owner/name", "a/b/c", "a b/c", "owner/", "", "a/b\n"]
)
def test_what_is_none(name):
    assert not is_hub_id(name)
