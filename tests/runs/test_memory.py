"""A long run does not grow: 10,000 pairs from parquet, row groups read on demand, images decoded and forgotten."""

import re
import subprocess
import sys

import pytest

from tests.help.worlds import make_pickapic

MEASURE = """
import sys
import dpo.data.parquet
import dpo.train

dpo.data.parquet.WINDOW_BYTES = 4 << 20  # a tenth of these pairs: at its own 2 GiB all of them would be kept
step = dpo.train.train_step

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

def measured(run, batches):
    if run.done % 10 == 0:
        print(f"update {run.done}: {resident():.1f} MiB", flush=True)
    return step(run, batches)

dpo.train.train_step = measured
sys.exit(dpo.train.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ten_thousand_pairs_keep_memory_flat(world, tmp_path):
    pairs = make_pickapic(tmp_path / "pairs", 10_000, size=(64, 64), shards=4, row_group_size=250)
    words = [
        "--model",
        world("sd15"),
        "--data",
        str(pairs),
        "--output",
        str(tmp_path / "out"),
        "--resolution",
        "16",
        "--lora",
    ]
    words += ["--batch-size", "100", "--epochs", "1", "--workers", "1", "--prefetch", "1", "--checkpoint-every", "25"]
    words += ["--validate-every", "0", "--sample-steps", "1", "--sample-seeds", "0", "--sample-prompts", "a red fox"]
    ended = subprocess.run([sys.executable, "-c", MEASURE, *words], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    found = {int(step): float(size) for step, size in re.findall(r"update (\d+): ([\d.]+) MiB", ended.stdout)}
    print(found)
    assert set(found) == set(range(0, 100, 10)), "100 updates of 100 pairs: one epoch"
    assert found[90] < found[30] + 20, "the files of these 6,000 pairs take 30 MiB, their pixels as much again"
