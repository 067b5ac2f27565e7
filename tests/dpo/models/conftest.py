"""Fixtures of the tests of models."""

from pathlib import Path

import pytest

from tests.help.worlds import KINDS


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """No test reaches the hub, whatever the environment says."""
    import huggingface_hub.constants

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)


@pytest.fixture(scope="session")
def pipelines(world) -> dict[str, Path]:
    """Folders of a tiny pipeline of every kind; to be read, not written into."""
    return {kind: Path(world(kind)) for kind in KINDS}
