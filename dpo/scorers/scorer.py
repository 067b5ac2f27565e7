"""What a scorer is, which there are, and how one is opened from the name that a person gives.

A scorer gives each image a number, seeing its caption; one of a set gives all images together a number (sets.py). Its
name says which weights and which preprocessing: two versions of one model are two names. Its fingerprint is of the weights'
content, the preprocessing and the dtype, so that scores of different ones are never mixed.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

import torch
from PIL import Image
from torch import Tensor

from dpo.common.errors import UserError
from dpo.common.files import checksum
from dpo.common.hub import is_hub_id
from dpo.common.words import excerpt, first_line
from dpo.scorers import own
from dpo.scorers.sets import SetScorer
from dpo.scorers.towers import FILES, folder_of, weights_here


class Scorer(Protocol):
    """Gives images numbers. `score` is called with keyword arguments.

    One with an attribute `size` (width, height) is shown images of that size alone; others are left out, which is said.
    One with an attribute `temperature` (a float) was trained to say P(a preferred to b) = sigmoid(temperature (score of a -
    score of b)); without one, or with None, its differences are no probabilities until one is fitted.
    """

    name: str  # as in --scorers
    fingerprint: str  # of weights, tokenizer, preprocessing and dtype

    def score(self, *, images: Sequence[Image.Image], captions: Sequence[str]) -> Tensor:
        """[N] float32 on the CPU: one number for each image (RGB) and its caption."""
        ...


class Listed(NamedTuple):
    """A scorer that comes with the package, and what a person should know of it."""

    name: str
    make: str  # "module:function", called as Opener is
    source: str  # the hub id of its weights, or where else they are
    licence: str
    gib: float  # of its weights
    scale: str  # in words
    higher_is_better: bool = True
    resolution: float = 0.0  # differences up to this are ties
    note: str = ""
    of_set: bool = False  # a SetScorer
    # Of one whose weights are a file that the user converted, NAME:FILE, functions "module:function" that take its name and
    checked: str = ""  # FILE or None: the file, once its header says that it is this scorer's
    beside: str = ""  # the file, cache_dir: what else it needs is fetched, unless it lies beside the file
    labelled: tuple[str, ...] = ()  # pairs, by a name of dpo/evaluating/provenance.py, whose labels it gave
    learned: tuple[str, ...] = ()  # pairs from whose labels it was trained


IN_PACKAGE = "in the package"

# (place: a local folder or file, None for the source; device; dtype of the towers; cache_dir of the hub) -> a scorer
Opener = Callable[..., Scorer | SetScorer]

LISTED: tuple[Listed, ...] = (
    Listed(
        "tiny-a", "dpo.tiny.scorer:judge_a", IN_PACKAGE, "Apache-2.0", 0.001, "0 to 3", resolution=1e-3,
        note="labelled the embedded pairs: use tiny-b to evaluate", labelled=("the embedded pairs",),
    ),
    Listed("tiny-b", "dpo.tiny.scorer:judge_b", IN_PACKAGE, "Apache-2.0", 0.001, "0 to 3", resolution=1e-3),
    Listed("tiny-b-faithful", "dpo.tiny.scorer:faithful_b", IN_PACKAGE, "Apache-2.0", 0.001, "0 or 1"),
    Listed(
        "tiny-detail-a", "dpo.tiny.scorer:detail_a", IN_PACKAGE, "Apache-2.0", 0, "log of grey levels", resolution=1e-3,
        note="labelled the pairs of python -m dpo.tiny.build --detail: use tiny-detail-b to evaluate", labelled=("the embedded pairs of detail",),
    ),
    Listed("tiny-detail-b", "dpo.tiny.scorer:detail_b", IN_PACKAGE, "Apache-2.0", 0, "log of a ratio", resolution=1e-3),
    Listed(
        "pickscore", "dpo.scorers.pickscore:pickscore", "yuvalkirstain/PickScore_v1", "not stated", 3.9, "about 20 to 23",
        note="learned from Pick-a-Pic, as models trained on those pairs are", learned=("Pick-a-Pic",),
    ),
    Listed("clip-l14", "dpo.scorers.clip:clip_l14", "openai/clip-vit-large-patch14", "MIT", 1.7, "cosine"),
    Listed("clip-h14", "dpo.scorers.clip:clip_h14", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "MIT", 3.9, "cosine"),
    Listed(
        "clip-h14-pad", "dpo.scorers.clip:clip_h14_pad", "laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "MIT", 3.9, "cosine",
        note="the whole image padded to a square, as Diffusion-DPO's own evaluation does",
    ),
    Listed(
        "hpsv2.0", "dpo.scorers.hpsv2:hpsv20", "xswu/HPSv2, converted", "Apache-2.0", 3.9, "100 x cosine, about 24 to 29",
        note="published as a pickle: --convert HPS_v2_compressed.pt, then hpsv2.0:FILE; not comparable with 2.1",
        checked="dpo.scorers.hpsv2:checked", beside="dpo.scorers.hpsv2:beside",
    ),
    Listed(
        "hpsv2.1", "dpo.scorers.hpsv2:hpsv21", "xswu/HPSv2, converted", "Apache-2.0", 3.9, "100 x cosine, about 20 to 34",
        note="published as a pickle: --convert HPS_v2.1_compressed.pt, then hpsv2.1:FILE; not comparable with 2.0",
        checked="dpo.scorers.hpsv2:checked", beside="dpo.scorers.hpsv2:beside",
    ),
    Listed(
        "hpsv2.0-no-antialias", "dpo.scorers.hpsv2:hpsv20_no_antialias", "xswu/HPSv2, converted", "Apache-2.0", 3.9,
        "100 x cosine, about 24 to 29", note="images resized as torchvision before 0.17 did; weights as hpsv2.0",
        checked="dpo.scorers.hpsv2:checked", beside="dpo.scorers.hpsv2:beside",
    ),
    Listed(
        "hpsv2.1-no-antialias", "dpo.scorers.hpsv2:hpsv21_no_antialias", "xswu/HPSv2, converted", "Apache-2.0", 3.9,
        "100 x cosine, about 20 to 34", note="images resized as torchvision before 0.17 did; weights as hpsv2.1",
        checked="dpo.scorers.hpsv2:checked", beside="dpo.scorers.hpsv2:beside",
    ),
    Listed(
        "aesthetic-v1", "dpo.scorers.aesthetic:aesthetic_v1", "LAION-AI/aesthetic-predictor, converted", "MIT", 1.7,
        "about 1 to 10", note="does not see the caption; published as a pickle: --convert sa_0_4_vit_l_14_linear.pth, then aesthetic-v1:FILE",
        checked="dpo.scorers.aesthetic:checked", beside="dpo.scorers.aesthetic:beside",
    ),
    Listed(
        "aesthetic-v2", "dpo.scorers.aesthetic:aesthetic_v2", "christophschuhmann/improved-aesthetic-predictor, converted",
        "Apache-2.0", 1.7, "about 1 to 10",
        note="does not see the caption; published as a pickle: --convert sac+logos+ava1-l14-linearMSE.pth, then "
        "aesthetic-v2:FILE",
        checked="dpo.scorers.aesthetic:checked", beside="dpo.scorers.aesthetic:beside",
    ),
    Listed(
        "imagereward", "dpo.scorers.imagereward:opened", "THUDM/ImageReward, converted", "Apache-2.0", 1.8, "about -2 to 2",
        note="published as a pickle: --convert ImageReward.pt, then imagereward:FILE",
        checked="dpo.scorers.imagereward:checked", beside="dpo.scorers.imagereward:beside",
    ),
    Listed(
        "diversity", "dpo.scorers.diversity:opened", "openai/clip-vit-large-patch14", "MIT", 1.7, "0 to 2", of_set=True,
        note="how far apart the images of a prompt are; wants --seeds 2 or more",
    ),
    Listed(
        "tiny-diversity", "dpo.tiny.scorer:diversity_b", IN_PACKAGE, "Apache-2.0", 0.001, "0 to 2", of_set=True,
        note="how far apart the images of a prompt are by what judge b sees; wants --seeds 2 or more",
    ),
    Listed(
        "inception-tv", "dpo.scorers.inception:torchvision", "torchvision, converted", "BSD-3-Clause", 0.1, "1 to 1000",
        of_set=True, checked="dpo.scorers.inception:checked",
        note="Inception Score: --convert inception_v3_google-0cc3c7bd.pth, then inception-tv:FILE; --prompts imagenet-classes "
        "--seeds 50",
    ),
    Listed(
        "inception-tf", "dpo.scorers.inception:tensorflow", "TensorFlow, converted", "Apache-2.0", 0.1, "1 to 1008",
        of_set=True, checked="dpo.scorers.inception:checked",
        note="the same by the network that defined it: --convert weights-inception-2015-12-05-6726825d.pth, then inception-tf:FILE",
    ),
)  # fmt: skip


def listing() -> str:
    """The table of all scorers, as text."""
    head = ("name", "of", "scale", "direction", "GiB", "licence", "from")
    rows = [
        (
            s.name,
            "a whole set" if s.of_set else "an image",
            s.scale,
            "higher is better" if s.higher_is_better else "lower is better",
            f"{s.gib:g}",
            s.licence,
            s.source,
        )
        for s in LISTED
    ]
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = [
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() for row in (head, *rows)
    ]
    notes = [f"{one.name}: {one.note}" for one in LISTED if one.note]
    yours = (
        "Your own: package.module:attribute, an object (or a function that makes one) with name, fingerprint and score; "
        "one of a set has features too."
    )
    place = "NAME:PLACE takes the weights from a local folder or file."
    return "\n".join([*lines, "", *notes, place, yours])


def listed(name: str) -> Listed | None:
    """The entry of a scorer in the list; None for a user's own."""
    return next((one for one in LISTED if one.name == name.partition(":")[0]), None)


def opened(
    name: str, *, device: torch.device, dtype: torch.dtype = torch.float32, cache_dir: str | Path | None = None
) -> Scorer | SetScorer:
    """The scorer of that name: "NAME", "NAME:PLACE" with local weights, or "package.module:attribute".

    One with features is a SetScorer. Raises UserError for a name that is none, and where its weights cannot be had.
    """
    known, (first, _, rest) = listed(name), name.partition(":")
    if known is not None:
        if rest and known.source == IN_PACKAGE:
            raise UserError(f"--scorers {name}: {known.name} lies in the package and takes no place")
        make = _attribute(known.make)
        return cast(Opener, make)(place=rest or None, device=device, dtype=dtype, cache_dir=cache_dir)
    if not rest:
        near = difflib.get_close_matches(first, [one.name for one in LISTED], 1)
        hint = f"did you mean {near[0]}?" if near else "python -m dpo.evaluate --scorers help lists them"
        raise UserError(f"--scorers {name}: there is no such scorer; {hint}")
    return own.adopted(name, _attribute(name))


def temperature_of(scorer: Scorer) -> float | None:
    """The factor between a difference of its scores and the logit of a preference; None where it has none of its own.

    Raises UserError for a user's own scorer whose temperature is no number above 0.
    """
    value = getattr(scorer, "temperature", None)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < math.inf:
        raise UserError(f"{scorer.name}: its temperature is {excerpt(value)}; a number above 0 is needed, or None")
    return float(value)


def check(name: str, device: torch.device) -> str:
    """The name that a scorer gives its scores, once it is known that it can be had; the hub is not asked, `fetch` does it.

    A user's own scorer is asked for two images. Raises UserError.
    """
    known, place = listed(name), name.partition(":")[2]
    if known is None:
        found = opened(name, device=device)
        assert isinstance(found, own.Own), "all that are not listed"
        own.tried(found)
        return found.name
    if known.checked:
        _attribute(known.checked)(known.name, place or None)
    if known.source == IN_PACKAGE and place:
        opened(name, device=device)
    return known.name


def fetch(name: str, cache_dir: str | Path | None = None) -> None:
    """Fetches the weights of a scorer whose weights are on the hub, and what one that was converted needs from there.

    Nothing is loaded. Raises UserError.
    """
    known, place = listed(name), name.partition(":")[2]
    if known is not None and is_hub_id(known.source):
        folder_of(known.name, place or known.source, cache_dir, FILES)
    if known is not None and known.beside:
        _attribute(known.beside)(known.name, _attribute(known.checked)(known.name, place or None), cache_dir)


def is_still(name: str, fingerprint: str, cache_dir: str | Path | None = None) -> bool:
    """Whether what had this fingerprint is what the name stands for now, as far as can be told without loading weights.

    A user's own scorer says its fingerprint; of weights that are on this machine, in a local place or in the hub's cache,
    the contents stand in it. Raises UserError.
    """
    known, place = listed(name), name.partition(":")[2]
    if known is None:
        return opened(name, device=torch.device("cpu")).fingerprint == fingerprint
    if known.checked:
        files = [_attribute(known.checked)(known.name, place or None)]
    else:
        files = weights_here(place or known.source, cache_dir)
    return all(checksum(path) in fingerprint for path in files)


def _attribute(path: str) -> Any:
    """What an import path "package.module:attribute" names. Raises UserError."""
    module, _, attribute = path.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"--scorers {path}: cannot be imported ({first_line(error)})") from error
