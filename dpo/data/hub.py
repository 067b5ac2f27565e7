"""Preference sets on the Hugging Face hub, read as parquet: no data set script ever runs.

The parquet files of the wanted split are taken from the repository, or, where it holds other files, from the copy in
parquet that the hub keeps of every public set (revision refs/convert/parquet). They are downloaded to the hub's cache
or, with streaming, read over the network a row group at a time: order, random access and resume are the same both ways.
"""

from __future__ import annotations

import functools
import re
from pathlib import PurePosixPath
from typing import TYPE_CHECKING

from dpo.common.errors import UserError
from dpo.common.hub import reason
from dpo.common.words import listed
from dpo.data.listing import NoSplit, is_junk
from dpo.data.parquet import Files
from dpo.settings.config import Data

if TYPE_CHECKING:
    from huggingface_hub import HfApi

CONVERTED = "refs/convert/parquet"
TIMEOUT = 30  # seconds for the hub to answer
SPLITS = {name: name for name in ("train", "validation", "test")}
SPLITS |= {
    "training": "train",
    "valid": "validation",
    "val": "validation",
    "dev": "validation",
    "eval": "validation",
    "testing": "test",
}
SHARD = re.compile(r"([-_.]\d+)?([-_.]of[-_.]\d+)?([-_.][0-9a-f]{8,})?$")


def split_of(name: str) -> str | None:
    """The split that a path names, as in "data/train-00000-of-00008.parquet" or "test/0000.parquet"; else None."""
    path = PurePosixPath(name)
    for part in (SHARD.sub("", path.stem), *reversed(path.parts[:-1])):
        first, *rest = re.split(r"[-_.]", part.lower())
        if first in SPLITS:
            return SPLITS[first] + ("_unique" if rest == ["unique"] else "")
    return None


def files_of_split(names: list[str], split: str, where: str) -> list[str]:
    """The files of a split, sorted; a file whose path names no split is "train".

    Raises NoSplit when there are none.
    """
    splits = {name: split_of(name) or "train" for name in names}
    chosen = sorted(name for name in names if splits[name] == SPLITS.get(split, split))
    if not chosen:
        raise NoSplit(f"{where}: has no split {split!r}, found {listed(sorted(set(splits.values())))}")
    return chosen


def hub_files(repo: str, data: Data, split: str) -> Files:
    """The parquet files of one split of a hub data set, downloaded when opened, or streamed with data.streaming.

    Raises UserError when the hub cannot be reached or has no such files.
    """
    import huggingface_hub

    where = f"data set {repo} on the hub"
    try:
        names, revision = _parquet_names(huggingface_hub.HfApi(), repo)
    except Exception as error:  # network, permission and offline errors of several libraries
        raise _unreachable(repo, error) from error
    if data.config_name is not None:
        names = [name for name in names if data.config_name in PurePosixPath(name).parts[:-1]]
    if not names:
        chosen = "" if data.config_name is None else f" of configuration {data.config_name!r}"
        raise UserError(f"{where}: has no parquet files{chosen}; download it and give the folder")
    configs = {PurePosixPath(name).parts[0] for name in names} if revision == CONVERTED else set()
    if len(configs) > 1:
        raise UserError(
            f"{where}: has several configurations ({listed(sorted(configs))}); choose one with --config-name"
        )
    names = files_of_split(names, split, where)
    if data.streaming:
        fs = huggingface_hub.HfFileSystem()
        return Files(names, lambda name: fs.open(f"datasets/{repo}/{name}", "rb", revision=revision))
    return Files(names, functools.cache(lambda name: _download(repo, name, revision)))


def _parquet_names(api: HfApi, repo: str) -> tuple[list[str], str | None]:
    """The parquet files of the repository, or of the hub's conversion of it, and the revision that they are in."""
    from huggingface_hub.errors import RevisionNotFoundError

    for revision in (None, CONVERTED):
        try:
            files = api.dataset_info(repo, revision=revision, timeout=TIMEOUT).siblings or []
        except RevisionNotFoundError:  # the hub has no conversion
            continue
        names = [file.rfilename for file in files if file.rfilename.lower().endswith(".parquet")]
        names = [name for name in names if not is_junk(name)]
        if names:
            return names, revision
    return [], None


def _download(repo: str, name: str, revision: str | None) -> str:
    """The local path of a file, downloaded when it is not in the hub's cache."""
    import huggingface_hub

    try:
        return huggingface_hub.hf_hub_download(repo, name, repo_type="dataset", revision=revision)
    except Exception as error:
        raise _unreachable(repo, error) from error


def _unreachable(repo: str, error: Exception) -> UserError:
    return UserError(
        f"data {repo!r} is no file or folder here and cannot be had from the hub ({reason(error)}): "
        "check the name and the connection, or give a local folder"
    )
