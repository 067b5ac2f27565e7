"""What a user asks to evaluate, and whether it can be done: looked at before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from dpo.common.errors import UserError
from dpo.data.pairs import check_pairs
from dpo.data.sources import open_source
from dpo.data.store.parts import has_buckets
from dpo.drawing import images
from dpo.evaluating.flags import Method, Named
from dpo.evaluating.scoring import read_table
from dpo.evaluating.sides import is_of_images, of_folder
from dpo.sampling import model
from dpo.sampling import work as sampling
from dpo.settings.config import Config, change, flatten
from dpo.tiny import paths


@dataclass(frozen=True)
class Asked:
    """What to evaluate."""

    base: Named
    others: tuple[Method, ...]
    draw: sampling.Asked  # how the models are drawn; its `model` is put in for each
    scorers: tuple[str, ...]
    tables: tuple[tuple[str, Path], ...] = ()  # scores of other programs, by name
    captions: Path | None = None  # prompts of folders that somebody else made
    guidance: tuple[float, ...] = ()  # the base is drawn with each; the rest with the first
    pairs: str | None = None  # labelled, for the implicit accuracy
    split: str | None = None
    half: bool = False  # towers of the scorers in bf16
    reproduce: str | None = None  # a published table
    command: str = ""  # as it was given, for the result

    @property
    def models(self) -> list[Named]:
        """All that is compared, the base first."""
        return [self.base, *(named for method in self.others for named in method.seeds)]


OF_SCORING = (
    "model",
    "device",
    "lora_base",
    "cache_dir",
    "sheets",
)  # of what is asked of the drawing, used without it too


def checked(asked: Asked) -> Config | None:
    """The settings of the implicit accuracy, where it is asked for. Raises UserError for what must fail later.

    Looks at every side, at the pairs and tables, and for flags that do not go together or that nothing is drawn by.
    """
    if asked.half and asked.reproduce is not None:
        raise UserError(
            f"--half gives the scores other names, and --reproduce {asked.reproduce} has numbers by scorers in full precision: "
            "leave one of them out"
        )
    for _, path in asked.tables:
        read_table(path)
    drawn = look_at(asked.models, asked.draw, asked.captions)
    if not drawn and asked.reproduce is None:
        check_undrawn(asked.draw)
    if len(asked.guidance) > 1 and asked.base not in drawn:
        raise UserError(
            f"--guidance {','.join(f'{scale:g}' for scale in asked.guidance)} draws the base with each, and {asked.base.name} is a "
            "folder of images: name one scale, or a model as the base"
        )
    if asked.pairs is None:
        return None
    if len(drawn) < len(asked.models):
        name = next(named.name for named in asked.models if named not in drawn)
        raise UserError(f"--pairs needs models, and {name} is a folder of images: leave it or --pairs out")
    return _of_pairs(asked)


def alike(asked: Asked) -> Asked:
    """`asked` with all models asked as the runs among them were trained: `sampling.alike`. Raises UserError."""
    return replace(asked, draw=drawn_alike(asked.models, asked.draw))


def drawn_alike(models: Sequence[Named], draw: sampling.Asked) -> sampling.Asked:
    """The same of what models are drawn with; folders of images are as they are. Raises UserError."""
    return sampling.alike(draw, [one.place for one in models if not _has_images(Path(one.place).expanduser())])


def look_at(models: Sequence[Named], draw: sampling.Asked, captions: Path | None) -> list[Named]:
    """Those that are drawn with. Raises UserError for a model that is not to be had and, where others are drawn, for images that
    cannot be used."""
    drawn = [named for named in models if not _has_images(Path(named.place).expanduser())]
    for named in drawn:
        model.check(named.place, draw.lora_base, draw.cache_dir)
    if drawn:
        for named in models:
            of_folder(named.name, Path(named.place).expanduser(), captions)
    return drawn


def check_undrawn(draw: sampling.Asked) -> None:
    """Raises UserError for a flag of the drawing, where nothing is drawn."""
    plain = sampling.Asked(model="")
    given = [one.name for one in fields(plain) if getattr(draw, one.name) != getattr(plain, one.name)]
    if idle := [name for name in given if name not in OF_SCORING]:
        raise UserError(
            f"--{idle[0].replace('_', '-')} is of the drawing, and all sides are folders of images, which are taken whole: leave it out"
        )


def _has_images(place: Path) -> bool:
    """Whether a folder's images are compared as they are: a set of dpo.sample's, or another program's."""
    return (place / images.PROTOCOL).is_file() or is_of_images(place)


def _of_pairs(asked: Asked) -> Config:
    """The settings by which the pairs are read. Raises UserError where they cannot be."""
    from dpo.settings.flags import parse

    place = str(paths.validation_pairs_path()) if asked.pairs == model.EMBEDDED else str(asked.pairs)
    flags = ["--data", place, "--device", asked.draw.device, "--precision", "fp32", "--workers", "0"]
    flags += ["--split", asked.split] if asked.split else []
    flags += ["--buckets"] if has_buckets(Path(place).expanduser()) else []
    base, _ = model.wanted_of(asked.base.place, asked.draw.lora_base, asked.draw.cache_dir)
    config, _ = parse([*flags, "--model", base["model"]])
    check_pairs(open_source(config.data), place, "this accuracy is of pairs: a run of --method kto measures its own")
    trained = model.as_trained([one.place for one in asked.models], asked.draw.lora_base, asked.draw.cache_dir)
    agreed = {name: values.pop() for name, values in trained.items() if len(values) == 1}
    return change(config, **base | agreed | ({"text_tokens": tokens} if (tokens := asked.draw.text_tokens) else {}))


def measured_otherwise(asked: Asked, config: Config) -> list[str]:
    """Lines on models whose implicit accuracy is measured, by `config`, otherwise than they were trained. Raises UserError."""
    taken, lines = flatten(config), []
    for one in asked.models:
        for name, values in model.as_trained([one.place], asked.draw.lora_base, asked.draw.cache_dir).items():
            here = "what the base's own files say" if taken[name] in (None, "auto") else taken[name]
            lines += [
                f"{one.name} was trained with --{name.replace('_', '-')} {value}, and its accuracy on --pairs is measured with {here}, as all "
                "are: compare it alone with what it started from"
                for value in values - {taken[name]}
            ]
    return lines
