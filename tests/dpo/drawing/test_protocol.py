"""dpo.drawing.protocol: equal where nothing differs, and the field that differs has a name."""

import json

import pytest

from dpo.drawing.protocol import Protocol
from tests.help.drawing import protocol


def test_it_comes_back_from_json_as_it_was():
    one = protocol(strengths=(0.6, 0.7), seeds=(0, 1))
    assert Protocol.from_json(json.loads(json.dumps(one.to_json()))) == one
    assert Protocol.from_json(one.to_json()).hash == one.hash


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"steps": 3}, ["steps"]),
        ({"versions": {"torch": "3"}}, ["versions.torch"]),
        ({"sampler_settings": {"clip_sample": False, "eta": 1}}, ["sampler_settings.eta"]),
        ({"group": 4, "guidance": 7.5}, ["guidance", "group"]),
    ],
)
def test_what_differs_is_named(change, names):
    one, other = protocol(), protocol(**change)
    assert one.differs(other) == names and one.differs(protocol()) == []
    assert one.hash != other.hash
    assert one.told(names[0]) != other.told(names[0])


def test_the_length_of_captions_is_of_models_that_have_several():
    """Sets of earlier versions say nothing of it, and are what they were."""
    plain, of_flow = protocol(), protocol(text_tokens=64)
    assert "text_tokens" not in plain.to_json() and Protocol.from_json(of_flow.to_json()) == of_flow
    assert of_flow.differs(plain) == ["text_tokens"] and of_flow.hash != plain.hash


@pytest.mark.parametrize("broken", [{}, [], {"steps": 3}, {**protocol().to_json(), "colour": 1}])
def test_another_versions_protocol_is_refused(broken):
    with pytest.raises(ValueError, match="not a protocol"):
        Protocol.from_json(broken)
