"""Train, resume, prepare and report on a machine without triton and without what only POSIX has, in a process of its own."""

import subprocess
import sys

from tests.help.elsewhere import environment

WORK = """
import importlib.util, os, signal, sys
from dpo import prepare, report, train
assert importlib.util.find_spec("triton") is None and not hasattr(os, "fork") and not hasattr(signal, "SIGALRM")
model, pairs, out, store = sys.argv[1:]
brief = ["--model", model, "--data", pairs, "--output", out, "--workers", "0", "--batch-size", "2", "--sample-steps", "1"]
brief += ["--sample-prompts", "a red fox", "--sample-seeds", "0", "--validate-every", "0"]
codes = [train.main([*brief, "--steps", "2", "--optimizer", "adamw8bit", "--checkpoint-every", "1"])]
codes.append(train.main(["--output", out, "--resume", "latest", "--steps", "3"]))
codes.append(prepare.main(["--model", model, "--data", pairs, "--store", store, "--workers", "0"]))
codes.append(report.main([out]))
print(codes)
"""


def test_the_commands_run_on_plain_torch(world, tmp_path):
    (tmp_path / "site").mkdir()
    out = tmp_path / "out"
    words = [world("sd15"), world("pairs"), str(out), str(tmp_path / "store")]
    ended = subprocess.run(
        [sys.executable, "-c", WORK, *words],
        check=False, env=environment(tmp_path / "site"), capture_output=True, text=True,
    )  # fmt: skip
    assert ended.returncode == 0 and ended.stdout.splitlines()[-1] == "[0, 0, 0, 0]", ended.stderr
    assert ended.stderr.count("triton is not installed: everything runs on plain torch") == 2  # once a training run
    assert (out / "report.html").exists() and (tmp_path / "store" / "store.json").exists()
