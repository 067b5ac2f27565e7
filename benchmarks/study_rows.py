"""The rows of the study: a name, and the flags of dpo.train that it stands for on top of `--preset tiny`."""

from typing import Any

Cell = dict[str, Any]  # what the judge said, `flags`, and for a row of TABLED the pieces of `table_history`
Cells = dict[str, dict[int, Cell]]  # row -> seed -> finished cell
DPO = ["--method", "dpo", "--beta", "2000"]
STEP = ["--method", "dde-step", "--beta", "2000"]
SEGMENTS = [f"dpo, t in [{low}, {low + 100})" for low in range(0, 1000, 100)]
ROWS: dict[str, list[str]] = {
    "sft": ["--method", "sft", "--learning-rate", "5e-5"],
    "dpo": DPO,
    "discounted": ["--method", "discounted", "--beta", "2000"],
    "dde-single": ["--method", "dde-single", "--beta", "200"],
    "dde-step": STEP,
    "dde": ["--method", "dde", "--beta", "200"],
    "sft, t in [700, 1000)": ["--method", "sft", "--learning-rate", "3e-5", "--window-low", "700"],
    "dpo, t in [700, 1000)": [*DPO, "--window-low", "700"],
    "dpo, t in [200, 700)": [*DPO, "--window-low", "200", "--window-high", "700"],
    **{
        name: [*DPO, "--window-low", str(100 * i), "--window-high", str(100 * i + 100)]
        for i, name in enumerate(SEGMENTS)
    },
    "dpo, LoRA": [*DPO, "--lora", "--rank", "8", "--learning-rate", "2e-4"],
    "dde-single, LoRA": ["--method", "dde-single", "--beta", "200", "--lora", "--rank", "8", "--learning-rate", "2e-4"],
    "dpo, soft labels": DPO,
    "dpo, swapped labels": DPO,
    "dpo, judged labels": DPO,
    "dde-single, soft labels": ["--method", "dde-single", "--beta", "200"],
    "dde-step, six times as long": [*STEP, "--steps", "600", "--rho", "0.5", "--scheduler", "cosine"],
}
TABLED = ("dde-step", "dde", "dde-step, six times as long")  # those with a correction table
QUARTERS = 4  # of a run: how often its table is looked at
