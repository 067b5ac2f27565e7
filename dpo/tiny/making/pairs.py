"""Preference pairs drawn by the base model and labelled by the hidden taste, as a Pick-a-Pic v2 table; prompt lists.

Both pictures of a pair come from one caption and two seeds. A judge reads their traits, the taste scores them, and a
noisy rater (Bradley-Terry) picks one; scores that are nearly equal are left as ties.

Training pairs, validation pairs, tuning prompts and report prompts share no caption and no seed.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from dpo.common.files import write_whole
from dpo.data.writing import PICKAPIC
from dpo.tiny.judge import Judge, score
from dpo.tiny.making.scenes import PHRASES, World, caption, prefer
from dpo.tiny.prompts import Prompts
from dpo.tiny.world import COLOURS, SLOPE

TIE = 0.04  # scores closer than this are called a tie
SHARES = {"train": 0.40, "validation": 0.10, "tuning": 0.20, "report": 0.30}  # of all captions
FIRST_SEED = {"train": 10_000_000, "validation": 20_000_000, "tuning": 30_000_000, "report": 40_000_000}


def split_captions(world: World) -> dict[str, list[str]]:
    """Every caption of the world in exactly one of the four lists, shuffled by the world's seed."""
    everything = [caption(o, c, p) for o in world.objects for c in COLOURS for p in range(len(PHRASES))]
    order = np.random.default_rng((world.seed, 2)).permutation(len(everything))
    ends = np.round(np.cumsum(list(SHARES.values())) * len(everything)).astype(int)
    return {kind: [everything[i] for i in part] for kind, part in zip(SHARES, np.split(order, ends[:-1]), strict=True)}


def prompts_of(world: World, kind: str, n: int) -> Prompts:
    """N captions of one list, repeated in order if it is shorter, each with a seed of its own."""
    captions = split_captions(world)[kind]
    return Prompts([captions[i % len(captions)] for i in range(n)], [FIRST_SEED[kind] + i for i in range(n)])


def write_prompts(world: World, counts: dict[str, int], path: Path) -> None:
    """prompts.json, as dpo/tiny/prompts.py reads it: kind -> that many prompts and seeds."""
    lists = {kind: prompts_of(world, kind, n) for kind, n in counts.items()}
    rows = {
        kind: [{"prompt": text, "seed": seed} for text, seed in zip(listed.captions, listed.seeds)]
        for kind, listed in lists.items()
    }
    path.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


def jpeg(image_HWC: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image_HWC).save(buffer, "JPEG", quality=92)
    return buffer.getvalue()


def uid(text: str) -> str:
    """A name in the form of a UUID, the same for the same text."""
    digest = hashlib.sha256(text.encode()).hexdigest()
    return "-".join((digest[:8], digest[8:12], digest[12:16], digest[16:20], digest[20:32]))


def judged(
    kind: str, captions: list[str], images_0: np.ndarray, images_1: np.ndarray, judge: Judge, rng: np.random.Generator
) -> tuple[pa.Table, dict[str, float]]:
    """`table` of pictures, uint8 [N, H, W, 3] each, that a judge scores."""
    scores = score(judge.read(images_0)), score(judge.read(images_1))
    return table(kind, captions, [jpeg(image) for image in images_0], [jpeg(image) for image in images_1], scores, rng)


def table(
    kind: str,
    captions: list[str],
    files_0: list[bytes],
    files_1: list[bytes],
    scores: tuple[np.ndarray, np.ndarray],
    rng: np.random.Generator,
    slope: float = SLOPE,
    least: float = TIE,
) -> tuple[pa.Table, dict[str, float]]:
    """(rows of N pairs that a noisy rater labels, figures that describe the labels).

    files: JPEG files of the pictures; scores: [N] each; slope: of the rater; least: scores closer than this are a tie.
    """
    score_0, score_1 = scores
    tie = np.abs(score_0 - score_1) < least
    label_0 = np.where(tie, 0.5, prefer(rng, score_0, score_1, slope).astype(float))
    rows = []
    for i, text in enumerate(captions):
        uids = [uid(f"{kind} {i} {side}") for side in (0, 1)]
        best = "tie" if tie[i] else uids[int(label_0[i] < 0.5)]
        rows.append(
            {
                "are_different": not bool(tie[i]),
                "best_image_uid": best,
                "caption": text,
                "created_at": 1_700_000_000_000_000_000 + i * 60_000_000_000,
                "has_label": True,
                "image_0_uid": uids[0],
                "image_0_url": "",
                "image_1_uid": uids[1],
                "image_1_url": "",
                "jpg_0": files_0[i],
                "jpg_1": files_1[i],
                "label_0": float(label_0[i]),
                "label_1": 1 - float(label_0[i]),
                "model_0": "dpo-tiny-base",
                "model_1": "dpo-tiny-base",
                "ranking_id": i,
                "user_id": 0,
                "num_example_per_prompt": captions.count(text),
                "__index_level_0__": i,
            }
        )
    agreement = ((score_0 > score_1) == (label_0 > 0.5))[~tie].mean() if not tie.all() else 1.0
    figures = {"pairs": len(rows), "ties": int(tie.sum()), "labels_agree_with_score": round(float(agreement), 4)}
    return pa.Table.from_pylist(rows, PICKAPIC), figures


def write(rows: pa.Table, path: Path) -> None:
    """A parquet file, put in place whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, lambda part: pq.write_table(rows, part, row_group_size=100, compression="snappy"))
