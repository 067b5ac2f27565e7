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
OBJECTIVES = {  # the kindred ones, with their own defaults; those that share dpo's logit have its beta
    "sdpo": ["--method", "sdpo", "--beta", "2000"],
    "kto": ["--method", "kto", "--beta", "1000"],
    "mapo": ["--method", "mapo"],
    **{f"dpo, {shape}": [*DPO, "--loss", shape] for shape in ("dmpo", "robust", "apo-zero", "poly")},
}
ROWS |= OBJECTIVES
METHODS = ["sft", "dpo", "discounted", "dde-single", "dde-step", "dde", *OBJECTIVES]  # compared on both tastes
DETAIL = ", for detail"  # the end of a row's name that trains and is judged on the second taste
JUDGED = ["--evaluate", "tiny-detail-b", "tiny-b", "tiny-b-faithful"]
ROWS |= {f"{name}{DETAIL}": [*ROWS[name], *JUDGED] for name in [*METHODS, "dpo, t in [700, 1000)", *SEGMENTS]}
OTHER_BETAS = {"dpo": ("100", "500", "8000"), "dde-single": ("50", "800")}  # the study's are of the first taste
ROWS |= {
    f"{name}, beta {beta}{DETAIL}": ["--method", name, "--beta", beta, *JUDGED]
    for name, betas in OTHER_BETAS.items()
    for beta in betas
}
MEASURED = ("dpo", f"dpo{DETAIL}")  # of whose runs d by tenth of the timesteps is kept
TABLED = ("dde-step", "dde", "dde-step, six times as long")  # those with a correction table
QUARTERS = 4  # of a run: how often its table is looked at
