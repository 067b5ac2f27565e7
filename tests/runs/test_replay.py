"""A replay is the run: its figures bit for bit on every path, and a planted pair is found."""

import json

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from dpo import prepare
from dpo.common.files import write_text
from dpo.pages.folder import CONFIG_FILE, read_run
from dpo.replaying import work
from dpo.replaying.pairs import keys_between, measured
from dpo.settings.config import to_toml
from dpo.tiny import paths
from dpo.train import train_step
from dpo.training.state import held, snapshot
from dpo.training.trackers import open_trackers
from tests.help.processes import together
from tests.help.running import advance, leave, make_run
from tests.help.worlds import make_folders
from tests.runs.test_processes import close

LORA = ["--lora", "--lora-dropout", "0.3", "--caption-dropout", "0.5"]
BEST = ["--keep-best", "--patience", "1", "--validate-every", "2", "--validation-fraction", "0.4"]
MORE = ["--optimizer", "adamw8bit", "--ema", "0.9", "--scheduler", "cosine"]


def replayed(run, update, tmp_path):
    leave(run, 5, 3)
    return work.replay(work.Asked(run.output, update, tmp_path / "found"), train_step)


@pytest.mark.parametrize(
    ("flags", "update"),
    [
        (["--method", "dde", "--accumulation", "2", *BEST], 4),
        (LORA, 2),
        pytest.param(MORE, 4, marks=pytest.mark.slow),
        pytest.param(["--precision", "bf16"], 4, marks=pytest.mark.slow),
    ],
    ids=[
        "dde, from a checkpoint, the best kept",
        "lora with dropout, from the start",
        "8-bit, averaged, cosine",
        "bf16",
    ],
)
def test_figures_are_those_of_the_run(world, tmp_path, flags, update):
    flags = ["--batch-size", "2", "--steps", "6", "--learning-rate", "1e-4", *flags]
    found = replayed(make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags), update, tmp_path)
    assert found["from"]["step"] == (3 if update == 4 else 0)
    assert found["compared"] == {"updates": found["from"]["updates"], "first": None}
    assert len(found["figures"]) > 20


def test_figures_of_a_recorded_reference_are_those_of_the_run(world, tmp_path):
    words = ["--model", world("sd15"), "--data", world("pairs"), "--dtype", "fp32", "--workers", "0", "--seed", "3"]
    assert prepare.main(["--store", str(tmp_path / "store"), "--reference", "--batch-size", "2", *words]) == 0
    flags = ["--reference", "recorded", "--seed", "3", "--batch-size", "2", "--steps", "6"]
    found = replayed(make_run(world("sd15"), str(tmp_path / "store"), tmp_path / "run", *flags), 5, tmp_path)
    assert found["compared"] == {"updates": 2, "first": None}
    assert len(list((tmp_path / "found" / "images").iterdir())) == 4, "decoded from their latents"


@pytest.mark.slow
@pytest.mark.parametrize("cut", [[], ["--sharding", "on"]], ids=["whole", "sharded"])
def test_figures_of_a_run_on_two_processes_are_those_up_to_the_order_of_sums(world, tmp_path, cut):
    """Made on two, asked on one: from a checkpoint, the same update of the same pairs."""
    flags = ["--precision", "fp64", "--learning-rate", "1e-4", "--eps", "1e-4", "--seed", "3", "--method", "dde"]
    flags += ["--batch-size", "1", "--effective-batch", "4", "--steps", "6", *cut]

    def work_of(processes):
        run = make_run(world("sd15"), world("pairs"), tmp_path / "run", *flags, processes=processes)
        met, inputs = [], run.encoder.inputs
        run.encoder.inputs = lambda batch: (met.append((run.done, *batch.keys.tolist())), inputs(batch))[1]
        trackers = open_trackers(run.output) if processes.first else None
        for _ in range(5):
            rate = run.learning_rate()
            figures = advance(run, 1)[0] | {"learning_rate": rate, "seconds": 1.0}
            if trackers:
                trackers.log(run.done, figures)
            if run.done == 3:
                processes.once(snapshot, run, held(run))
        if trackers:
            trackers.close()
            write_text(run.output / CONFIG_FILE, to_toml(run.config))
        return [key for done, key in met if done == 4]

    world("sd15"), world("pairs")
    keys = [key for of_one in together(2, work_of, tmp_path) for key in of_one]
    found = work.replay(work.Asked(tmp_path / "run", 5, tmp_path / "found"), train_step)
    assert found["from"] == {"step": 3, "checkpoint": "step-00000003", "updates": 2}
    assert found["of_run"]["processes"] == 2
    assert len(keys) == 4 and {pair["key"] for pair in found["pairs"]} == set(map(str, keys))
    logged = {record["step"]: record for record in read_run(tmp_path / "run").updates}[5]
    assert len(found["figures"]) > 20
    assert [name for name, value in found["figures"].items() if not close(value, logged[name], 1e-8)] == []


def swapped(win, lose):
    """The label the wrong way round."""
    data = win.read_bytes(), lose.read_bytes()
    win.write_bytes(data[1])
    lose.write_bytes(data[0])


def black(win, lose):
    """The preferred image is garbage: black, as a download that failed leaves it."""
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(win, quality=95)


def noise(win, lose):
    """The preferred image is garbage: no picture at all."""
    pixels = np.random.default_rng(7).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(win, quality=95)


SEEDS = [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 20))]


def planted(model, folder, plant, seed, epoch, output, *flags):
    """(key of the pair that was spoilt, pairs of its update in `epoch` of three updates, the heaviest first)."""
    plant(folder / "w" / "00007.jpg", folder / "l" / "00007.jpg")
    flags = ["--batch-size", "8", "--seed", str(seed), "--window-low", "300", *flags]
    run = make_run(str(model), str(folder), output, *flags)
    key, first = run.source[7].key, 3 * epoch - 2
    update = next(update for update in range(first, first + 3) if key in keys_between(run, update, update))
    advance(run, update - 1)
    return key, measured(run)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_swapped_label_has_the_largest_share(world, tmp_path, seed):
    """In the fifth epoch, when the model tells winners from losers."""
    folder = make_folders(tmp_path / "pairs", 24, seed)
    flags = ["--learning-rate", "1e-4", "--beta", "500", "--window-high", "900"]
    key, found = planted(world("sd15"), folder, swapped, seed, 5, tmp_path / "run", *flags)
    assert key == found[0].key


def small_world_folders(folder, count, seed):
    """`count` labelled pairs of the small world, drawn by `seed`, as w/ and l/ with their captions; the folder."""
    rows = [row for row in pq.read_table(paths.train_pairs_path()).to_pylist() if row["label_0"] != 0.5]
    for side in "wl":
        (folder / side).mkdir(parents=True)
    lines = []
    for number, at in enumerate(np.random.default_rng(seed).permutation(len(rows))[:count]):
        name, row = f"{number:05d}.jpg", rows[at]
        sides = "wl" if row["label_0"] > 0.5 else "lw"
        for side, data in zip(sides, (row["jpg_0"], row["jpg_1"]), strict=True):
            (folder / side / name).write_bytes(data)
        lines.append(json.dumps({"file_name": name, "caption": row["caption"]}))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("plant", [black, pytest.param(noise, marks=pytest.mark.slow)])
def test_a_garbage_image_has_the_largest_share(tmp_path, plant, seed):
    """Where it is first met, by a model that knows pictures: the small world's own, with its pairs and learning rate."""
    folder = small_world_folders(tmp_path / "pairs", 24, seed)
    flags = ["--learning-rate", "1e-5", "--window-high", "650"]
    key, found = planted(paths.pipeline_path(), folder, plant, seed, 1, tmp_path / "run", *flags)
    assert key == found[0].key and found[0].share > 0.2
