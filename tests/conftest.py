"""Settings of every test: one thread a process (two share the machine's cores), no network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder of a tiny pipeline by kind, and of 48 learnable pairs under "pairs"; made once a session."""
    from tests.help.worlds import make_pickapic, make_pipeline

    root = tmp_path_factory.mktemp("world")
    made: dict[str, str] = {}

    def place(name: str) -> str:
        if name not in made:
            folder = root / name
            made[name] = str(make_pickapic(folder, 48, 0) if name == "pairs" else make_pipeline(folder, name))
        return made[name]

    return place
