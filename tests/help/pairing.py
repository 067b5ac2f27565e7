"""dpo.pairs in the test's own process, and a ranking to make pairs of."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

from dpo import pairs
from tests.help.commands import quietly
from tests.help.worlds import draw, encode


def paired(capsys, *words: object, output: Path) -> tuple[int, str]:
    """Runs `python -m dpo.pairs words... --output output`: its exit code and what it wrote to stderr."""
    return quietly(pairs.main, capsys, *words, "--output", output)


def make_ranking(folder: Path, prompts: int = 4, size: tuple[int, int] = (32, 32)) -> Path:
    """ranking.csv beside images/: four images of a prompt, of rank 1 (bright), 2 (bright), 3 and 3 (dark); its path."""
    (folder / "images").mkdir(parents=True)
    rows = [("image", "rank", "prompt")]
    for prompt in range(prompts):
        for place, rank in enumerate((1, 2, 3, 3)):
            name = f"images/{prompt}-{place}.jpg"
            (folder / name).write_bytes(encode(draw(np.random.default_rng([prompt, place]), rank < 3, size)))
            rows.append((name, str(rank), f"a fox, number {prompt}"))
    with (folder / "ranking.csv").open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)
    return folder / "ranking.csv"
