"""Prepare once, train many times: encode pairs into a store, and record the reference's errors on them.

    python -m dpo.prepare --store STORE --model MODEL --data PAIRS                  encode every image and caption once
    python -m dpo.prepare --store STORE --model MODEL --reference --draws 4         record the reference's errors
    python -m dpo.prepare --store STORE --verify                                    check every byte

Then `python -m dpo.train --model MODEL --data STORE --reference recorded`. Killed at any moment, the same command goes on.
The flags of dpo.train that decide how pairs are read and encoded, or what the reference is, are accepted too: give the same ones.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from dpo.common import command
from dpo.common.errors import UserError
from dpo.sampling import flags
from dpo.settings.config import Config

DTYPES = ("fp16", "bf16", "fp32")


TEXT_BATCH = 32

log = logging.getLogger("dpo")


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0 when all is done, 1 when --verify found damage or unfinished work, 2 after a user's mistake, 130 on Ctrl-C."""
    return command.run("dpo.prepare", lambda: _command(sys.argv[1:] if argv is None else argv), command.GOES_ON)


def _command(argv: Sequence[str]) -> int:
    from dpo.common import console

    own, rest = make_parser().parse_known_args(list(argv))
    console.setup()
    return run(own, rest)


def run(own: argparse.Namespace, rest: list[str]) -> int:
    """Verifies, merges, encodes or records as `own` asks; `rest` are flags of dpo.train. Returns the exit code."""
    from dpo.common import locks
    from dpo.data.store import store
    from dpo.training import preparing
    from dpo.training.folder import check_apart, check_own

    folder = Path(own.store).expanduser()
    if own.verify:
        return _verify(folder)
    if own.merge is not None:
        parts = [Path(part).expanduser() for part in own.merge] or preparing.parts_in(folder)
        with locks.held(folder, "--store"):
            store.merge(folder, parts)
        log.info("%s: %d parts, %s pairs", folder, len(parts), f"{len(store.read_contents(folder).order):,}")
        return 0
    shard = command.shard_of(own.shard)
    config = _config(folder, rest)
    there = store.is_store(folder)
    itself = there and config.data.data == str(folder)
    if itself and not own.reference:
        raise UserError(
            f"--data {folder} is the prepared store itself, so there is nothing to prepare: add --reference to record errors, "
            "--verify to check it, or name the --data that it is made from"
        )
    if not itself:
        check_apart("--store", folder, config, known=there)
        if not there:
            check_own("--store", folder)
        preparing.encode_pairs(
            config, folder, own.dtype, shard=shard, pairs_per_shard=own.pairs_per_shard, text_batch=own.text_batch
        )
        if shard[1] > 1 and not preparing.merge_when_complete(folder, shard[1]):
            return 0
    if own.reference:
        preparing.record_reference(config, folder, own.draws, shard=shard, batch_size=own.record_batch)
    return 0


def _verify(folder: Path) -> int:
    """Checks every byte of a store and its records, or of the parts below; 1 when one is damaged or not finished."""
    from dpo.data.store import recorded, store

    places = [folder] if store.is_store(folder) else sorted(filter(store.is_store, folder.glob("part-*-of-*")))
    if not places:
        raise UserError(f"{folder}: no prepared store is there, so there is nothing to check")
    wrong = [line for place in places for line in store.verify(place) + recorded.verify(place)]
    for line in wrong:
        log.error("%s", line)
    if wrong:
        log.error("%s: %d %s damaged", folder, len(wrong), "file is" if len(wrong) == 1 else "files are")
        return 1
    left = list(filter(None, map(store.unfinished, places)))
    if places != [folder]:
        left.append(f"{folder} has parts that are not merged: prepare those that are missing, then --merge")
    elif not left:
        left = recorded.unfinished(folder, len(store.read_contents(folder).key))
    for line in left:
        log.warning("%s", line)
    log.info("%s: every checksum is right%s", folder, " of what is there" if left else "")
    return 1 if left else 0


# --- command line


def make_parser() -> argparse.ArgumentParser:
    """The parser of this command's own flags; dpo.train's parser reads the others."""
    parser = command.Parser(
        prog="dpo.prepare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        epilog="All flags of python -m dpo.train are understood as well.",
    )
    parser.add_argument(
        "--store", required=True, type=command.folder, metavar="FOLDER", help="the prepared store, made or added to"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp16", help="of the stored latents and text (default: fp16)"
    )
    parser.add_argument("--reference", action="store_true", help="record the reference's errors too")
    parser.add_argument(
        "--draws", type=flags.above(0), default=4, metavar="K", help="draws of (timestep, noise) per pair (default: 4)"
    )
    parser.add_argument(
        "--record-batch",
        type=flags.above(0),
        metavar="N",
        help="pairs a batch when recording (default: as many as fit; on a CPU --batch-size)",
    )
    parser.add_argument(
        "--shard", metavar="I/N", help="be process I of N (default: from torchrun's environment, else 0/1)"
    )
    parser.add_argument(
        "--merge",
        nargs="*",
        metavar="PART",
        help="make the store an index over finished parts (default: those below it)",
    )
    parser.add_argument("--verify", action="store_true", help="check every byte of the store and its records")
    parser.add_argument(
        "--pairs-per-shard", type=flags.above(0), metavar="N", help="pairs in one file (default: about 256 MiB)"
    )
    parser.add_argument(
        "--text-batch",
        type=flags.above(0),
        default=TEXT_BATCH,
        metavar="N",
        help="captions encoded at once (default: 32)",
    )
    return parser


def _config(folder: Path, rest: list[str]) -> Config:
    """The settings from dpo.train's flags.

    Without --data, and where a preset or a file names none, the pairs are those of the store in `folder`, if it is one;
    without a model too, the embedded ones.
    """
    from dpo.data.store.store import is_store
    from dpo.settings.flags import parse
    from dpo.training.preparing import is_embedded

    names = {word.split("=")[0].replace("_", "-") for word in rest}
    named = names & {"--data", "--dataset-name", "--train-data-dir", "--config", "--preset"}
    model = names & {"--model", "--pretrained-model-name-or-path"}
    if not named and is_store(folder) and not (is_embedded(folder) and not model):
        if not model:
            raise UserError(f"{folder} is a store: give the --model that it was prepared with")
        rest = [*rest, "--data", str(folder)]
    elif not named and model:
        raise UserError(f"{folder} is no prepared store: correct --store, or give the --data to prepare there")
    elif not named:
        log.warning("no --model and no --data: %s is a store of the small world inside the package", folder)
    also = [flag for action in make_parser()._actions for flag in action.option_strings]
    if named and is_store(folder):
        found, _ = parse(rest, also=also, with_pairs=False)
        rest += ["--data", str(folder)] if found.model.model and not found.data.data else []
    config, notes = parse(rest, also=also)
    for note in notes:
        log.info("%s", note)
    return config


if __name__ == "__main__":
    sys.exit(main())
