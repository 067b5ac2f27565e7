"""What to do with a run that has ended, in lines for the log: where to look, how to use it, how to go on."""

from __future__ import annotations

from collections.abc import Sequence

from dpo.common.words import command_line
from dpo.pages import kept
from dpo.pages.card import usage
from dpo.pages.folder import EVALUATION, REPORT_FILE, RunFolder


def next_steps(run: RunFolder, judged: Sequence[str]) -> list[str]:
    """The lines. All paths are absolute, and quoted where a shell wants that.

    judged: flags of python -m dpo.evaluate with which the embedded model is judged.
    """
    here = run.folder.resolve()
    look = [here / REPORT_FILE, *kept.grids(run)[-1:]]
    if run.evaluation:
        look.append(here / EVALUATION / "evaluation.html")
    images = here.with_name(f"{here.name}-images")
    lines = [f"look at it: {', '.join(str(path.resolve()) for path in look)}", "use it, in Python:"]
    lines += [f"    {line}" for line in usage(run, str(here), here=True).splitlines() if line]
    draw = ["dpo.sample", str(here), "--prompts", "a prompt", "--output", str(images)]
    lines.append(f"draw more: {command_line(draw)}")
    if not run.evaluation:
        sides = [f"start=start:{here}", f"aligned={here}"]
        whose = "by its own judge" if run.embedded else "on your prompts"
        scored = judged if run.embedded else ["--prompts", "prompts.txt", "--scorers", "pickscore"]
        compare = ["dpo.evaluate", *sides, *scored, "--output", str(here.with_name(f"{here.name}-evaluation"))]
        lines.append(f"is it better, {whose}: {command_line(compare)}")
    if not run.embedded and run.setting("prediction_type") != "flow_prediction":  # those files are as they are
        lines.append(f"for ComfyUI: {command_line(['dpo.export', str(here), '--to', 'comfyui'])}")
    return lines
