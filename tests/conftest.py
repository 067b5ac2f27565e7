"""Settings of every test: one thread a process (two share the machine's cores), no network, little collecting of garbage.

Of what imports make nothing is garbage, and it is most of what there is: looked through again and again it would take a
tenth of the tests' time, and a quarter of every run's, which collects garbage at its end.
"""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pytest
import torch

torch.set_num_threads(1)
gc.disable()  # while the tests are imported


def look_no_more() -> None:
    """What there is now is left out when garbage is collected."""
    gc.collect()
    gc.freeze()


def pytest_collection_finish(session):
    look_no_more()
    gc.enable()


def pytest_unconfigure(config):
    gc.unfreeze()  # or bindings complain at the end of what they think leaked


@pytest.fixture
def pageless(monkeypatch):
    """Leaves out the pages at the end of a run, which take a second; summary.json and tables.json are written."""
    from dpo.training import summary

    monkeypatch.setattr(summary, "_write_pages", lambda *args, **named: None)


@pytest.fixture(scope="session")
def world(tmp_path_factory):
    """Folder of a tiny pipeline by kind, and of 48 learnable pairs under "pairs"; made once a session."""
    from tests.help.flow import FLOWS, make_flow
    from tests.help.worlds import make_pickapic, make_pipeline

    root = tmp_path_factory.mktemp("world")
    made: dict[str, str] = {}

    def place(name: str) -> str:
        if name not in made:
            folder, first = root / name, made.keys() <= {"pairs"}
            make = make_flow if name in FLOWS else make_pipeline
            made[name] = str(make_pickapic(folder, 48, 0) if name == "pairs" else make(folder, name))
            if first:
                look_no_more()  # diffusers and transformers have been imported
        return made[name]

    return place
