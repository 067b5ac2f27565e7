"""Models that cannot be loaded."""

import pytest

from dpo.common.errors import UserError
from dpo.models.load import load


def refused(*args, **options) -> str:
    """The one line that says why `load(*args, **options)` is refused."""
    with pytest.raises(UserError) as caught:
        load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 700
    return message
