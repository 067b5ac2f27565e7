"""The end of a run: its saved result against its start, by python -m dpo.evaluate, in a folder of the run's own."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path

from dpo.common import files
from dpo.common.errors import UserError
from dpo.common.words import first_line
from dpo.pages.folder import ENTRIES, EVALUATION
from dpo.tiny import outcome
from dpo.training.folder import clear_entry
from dpo.training.run import Figures, Run

log = logging.getLogger("dpo")

CAPTIONS = 200  # of the held-out pairs, where no prompts are named
PROMPTS_FILE = "prompts.jsonl"
# Flags of python -m dpo.evaluate that compare on the embedded world, whose drawings no published scorer knows.
EMBEDDED = (*outcome.DRAWN, "--prompts", outcome.PROMPTS, "--scorers", outcome.JUDGE)

Evaluate = Callable[[Sequence[str]], Path]  # the words of python -m dpo.evaluate -> its evaluation.json


def words(run: Run) -> list[str]:
    """The command line of python -m dpo.evaluate that compares the result with its start; empty where none is wanted.

    Raises UserError where there are no prompts to draw.
    """
    out, embedded = run.config.output, outcome.is_embedded(run.model)
    scorers = out.evaluate or ((outcome.JUDGE, outcome.FAITHFUL) if embedded and out.judge else ())
    if not scorers:
        return []
    folder = run.output / EVALUATION
    sides = [f"start=start:{run.output}", f"aligned={run.output}"]
    kept = run.config.model.cache_dir  # of scorers too
    named = ["--output", str(folder), "--device", run.config.runtime.device, *(["--cache-dir", kept] if kept else [])]
    named += ["--scorers", *scorers, "--prompts"]
    if embedded and not out.evaluate_prompts:
        return [*sides, *outcome.DRAWN, *named, outcome.PROMPTS]
    drawn = ["--steps", str(out.sample_steps), "--guidance", f"{out.sample_guidance:g}"]
    if not (out.evaluate_prompts or _captions(run)):
        raise UserError("--evaluate: no pairs are held out whose captions could be drawn; give --evaluate-prompts")
    return [*sides, *drawn, *named, *(out.evaluate_prompts or [str(folder / PROMPTS_FILE)])]


def _captions(run: Run) -> list[str]:
    """Different captions of the held-out pairs, in their order."""
    source = run.held_out_source
    found: dict[str, None] = {}
    for index in range(len(source) if source is not None else 0):
        if len(found) == CAPTIONS:
            break
        assert source is not None
        found.setdefault(source[index].caption)
    return [caption for caption in found if caption.strip()]


def prepare(run: Run) -> None:
    """Makes the folder; what a run left there of weights that were trained on since is deleted, links and the user's files stay."""
    folder = run.output / EVALUATION
    if not run.complete:
        clear_entry(folder, next(entry for entry in ENTRIES if entry.name == EVALUATION))
    folder.mkdir(exist_ok=True)
    lines = [json.dumps({"prompt": caption}) for caption in _captions(run)]
    files.write_text(folder / PROMPTS_FILE, "".join(f"{line}\n" for line in lines))


def evaluated(evaluate: Evaluate, asked: Sequence[str]) -> Figures:
    """The figures of the comparison for the run's summary; empty, with a line that says why, where it failed."""
    log.info("comparing the result with its start: python -m dpo.evaluate %s", shlex.join(asked))
    try:
        found = json.loads(evaluate(asked).read_text("utf-8"))
    except Exception as error:  # whatever it is, the run is whole
        log.warning(
            "not compared with its start (%s); the run itself is whole. Later: python -m dpo.evaluate %s",
            first_line(error).rstrip("."),
            shlex.join(asked),
        )
        return {}
    figures = outcome.figures(found["results"])
    if figures:
        low, high = figures["win_rate_interval"]
        obeyed = ""
        if "faithfulness_before" in figures:
            obeyed = f", captions obeyed {figures['faithfulness_before']:.3f} -> {figures['faithfulness_after']:.3f}"
        log.info(
            "win rate over the start by %s %.3f (95 %% interval %.3f to %.3f, %d prompts)%s",
            figures["judge"], figures["win_rate"], low, high, figures["prompts"], obeyed,
        )  # fmt: skip
    return figures
