"""Settings for the data tests."""

import pytest

from dpo.settings.config import Data


@pytest.fixture
def settings():
    """settings(path, **changes) -> Data"""

    def make(data, **changes):
        return Data(data=str(data), **changes)

    return make
