"""The command line: flags made from `dpo.settings.config`, over a preset, a TOML file or another trainer's defaults."""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import sys
import textwrap
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

from dpo.common import libraries
from dpo.common.command import Parser
from dpo.common.errors import UserError
from dpo.common.words import first_line
from dpo.settings import compat, recipe
from dpo.settings.config import (
    Config,
    flat_settings,
    flatten,
    from_mapping,
    groups,
    of_before,
    specs,
    to_toml,
    unknown_setting,
)
from dpo.settings.fields import NOTHING, Spec, brief, coerce, nearest
from dpo.settings.rules import without_effect

USAGE = "python -m dpo.train [--preset NAME | --config FILE.toml] [flags]"


EPILOG = (
    "Flags may be spelled with - or _. The flags of the diffusers and Salesforce trainers are accepted too (docs/flags.md); "
    "--compat gives them those scripts' meanings. Without any model and data the small world inside the package is trained, "
    "with the settings of --preset tiny and not the defaults shown here: --print-config shows what a command would use."
)


STARTS = ("preset", "config", "compat")  # what settings are laid over


def parse(argv: Sequence[str], also: Sequence[str] = (), *, with_pairs: bool = True) -> tuple[Config, list[str]]:
    """The settings that `argv` asks for, and lines for the log on how it was read.

    also: further flags that the caller knows, so that a misspelt one of them gets a suggestion too. with_pairs: whether
    a named model needs pairs. Raises UserError, and SystemExit after --help and --print-config.
    """
    given = read_flags(argv, also)
    printed = given.pop("print_config", False)
    config, notes = _settled(given, _repeated(argv), with_pairs)
    if printed:
        sys.stdout.write("".join(f"# {note}\n" for note in notes) + to_toml(config))
        raise SystemExit(0)
    return config, notes


def asked(settings: Mapping[str, Any]) -> tuple[Config, list[str]]:
    """The settings that a program asks for by our own names, and lines for the log; read as `parse` reads flags.

    `preset` or `config` (a TOML file) may be among them. A path may be a Path; None is what a flag's "none" is. Raises
    UserError.
    """
    given = {}
    for name, value in settings.items():
        if name not in (*specs(), "preset", "config"):
            raise UserError(unknown_setting(name))
        given[name] = "none" if value is None and name in specs() else plain(value)
    return _settled(given)


def plain(value: Any) -> Any:
    """A value of Python's as a TOML file would have it: a path is text."""
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _settled(
    given: Mapping[str, Any], repeated: Sequence[str] = (), with_pairs: bool = True
) -> tuple[Config, list[str]]:
    """The Config of settings by name, also by other trainers' names, laid over STARTS; and lines for the log."""
    start = {name: given.get(name) for name in STARTS}
    if start["preset"] and start["config"]:
        raise UserError("--preset and --config are two starting points: give one")
    if start["compat"] and start["compat"] not in compat.PEERS:
        raise UserError(f"--compat {start['compat']}: expected one of {', '.join(compat.PEERS)}")
    named = {name: value for name, value in given.items() if name not in STARTS}
    changes, notes = compat.translate(named, start["compat"])
    notes += repeated
    file = flat_settings(load_config(start["config"])) if start["config"] else {}
    if start["config"] and (Path(start["config"]).parent / "metrics.jsonl").is_file():  # a run's: how that had begun
        file |= {"overwrite": False, "resume": None}
    if changes.get("run_name", "none") not in NOTHING and "output" not in changes | file:
        changes["output"] = f"runs/{changes['run_name']}"
    base = _base(start, changes, file, notes)
    notes += _untracked(base, changes) if start["compat"] else []
    for one, other in (("resume", "overwrite"), ("overwrite", "resume")):  # a flag beats the opposite in a preset
        if changes.get(one):
            base.pop(other, None)
    if "overwrite" not in changes and changes.get("output", base.get("output")) != base.get("output"):
        base.pop("overwrite", None)  # overwrite in a preset or file holds for the output folder named there alone
    if {"accumulation", "effective_batch"} <= changes.keys():
        raise UserError("--effective-batch and --accumulation: the one follows from the other; give one")
    if start["compat"] and {"steps", "epochs"} <= changes.keys():  # those scripts take both, and count the one
        del changes["epochs"]
        notes.append("--epochs has no effect because --steps is given")
    config = from_mapping(recipe.over(base, changes))
    if with_pairs and config.model.model and not config.data.data:
        raise UserError("no pairs to train on: give --data (hub id, folder, glob or file)")
    if config.data.data and not config.model.model:
        raise UserError(
            "no model to align: give --model (diffusers folder, hub id, .safetensors file, or embedded: the small one in the package)"
        )
    notes += [] if start["compat"] else _of_rank(config.lora.lora, changes)
    return config, notes + without_effect(flatten(config), changes, specs())


def _of_rank(lora: bool, changes: Mapping[str, Any]) -> list[str]:
    """A line for the log on --rank beside settings that, all in all, train no adapter."""
    if lora or "rank" not in changes:
        return []
    return [
        "--rank is for --lora: in the diffusers scripts it means LoRA, here the whole UNet is trained without --lora"
    ]


def _untracked(base: dict[str, Any], changes: Mapping[str, Any]) -> list[str]:
    """Leaves TensorBoard out of `base` where it is not installed and only a script's default asks for it; says so.

    One that is asked for stops the run later: training.trackers.check.
    """
    if "tensorboard" in changes or not base.get("tensorboard") or libraries.is_there("tensorboard"):
        return []
    base["tensorboard"] = False
    return [
        f"--report_to tensorboard, the script's default: it is not installed, so it is left out: {libraries.TRACKING}"
    ]


def presets() -> dict[str, str]:
    """The names of the presets, each with the first line of its file."""
    files = {
        entry.name[:-5]: entry
        for entry in resources.files("dpo.settings").joinpath("presets").iterdir()
        if entry.name.endswith(".toml")
    }
    return {name: files[name].read_text("utf-8").splitlines()[0].lstrip("# ") for name in sorted(files)}


def load_preset(name: str) -> dict[str, Any]:
    """The settings of one preset. Raises UserError for a name that is not one."""
    if name not in presets():
        raise UserError(f"--preset {name}: expected one of {', '.join(presets())}")
    return tomllib.loads(resources.files("dpo.settings").joinpath("presets", f"{name}.toml").read_text("utf-8"))


def load_config(path: str, flag: str = "--config") -> dict[str, Any]:
    """The settings of a TOML file. Raises UserError that begins with `flag`, which named the file."""
    try:
        if Path(path).exists() and not Path(path).is_file():  # a device has no end
            raise UserError(f"{flag} {path}: is no regular file")
        return tomllib.loads(Path(path).read_text("utf-8-sig"))  # editors on Windows begin a file with a BOM
    except OSError as error:
        raise UserError(f"{flag} {path}: {error.strerror or error}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, values nested thousands deep
        raise UserError(f"{flag} {path}: not TOML ({first_line(error)})") from None


def _base(
    start: Mapping[str, Any], changes: Mapping[str, Any], file: Mapping[str, Any], notes: list[str]
) -> dict[str, Any]:
    """The settings that the flags change: a script's defaults, over them a preset's, over them those of a file.

    Without any start: those of the run that --resume continues, unless both model and data are named, which is a whole
    command line. Without a run, a model and data: the tiny preset.
    """
    peer, preset = start["compat"], start["preset"]
    named = bool(changes.get("model")) + bool(changes.get("data"))
    if not (peer or preset or start["config"] or named == 2):
        file = _of_resumed_run(changes, notes)
        preset = None if file or named else "tiny"
    file = recipe.flags_beat(file, changes, notes)
    said = {**file, **changes}
    of_preset = flat_settings(load_preset(preset)) if preset else {}
    of_preset = recipe.beside(of_preset, said, f"preset {preset}", notes)
    of_peer = compat.defaults(peer, changes) if peer else {}
    of_peer = recipe.beside(of_peer, of_preset | said, f"--compat {peer}", notes)
    return recipe.over(recipe.over(of_peer, of_preset), file)


def _of_resumed_run(changes: Mapping[str, Any], notes: list[str]) -> dict[str, Any]:
    """The settings of the run that --resume continues, from its config.toml, without the device, which is chosen anew.

    Empty when nothing is resumed. Raises UserError when the named folder holds no run.
    """
    resume = changes.get("resume", "none")
    if resume in NOTHING:
        return {}
    output = str(changes.get("output") or load_preset("tiny")["output"]["output"])
    named = Path(resume).expanduser()
    above = 3 if named.parent.name.startswith("abandoned-") else 2  # in checkpoints/abandoned-N/, else in checkpoints/
    folders = [Path(output).expanduser()] if resume == "latest" else [named, *named.parents[:above]]
    for file in (folder / "config.toml" for folder in folders):
        if file.is_file():
            notes.append(f"settings of the run that is continued: {file}")
            saved = of_before(flat_settings(load_config(str(file), flag="settings of the run to continue,")))
            saved |= {"output": str(file.parent)}  # the folder may have moved
            return {name: value for name, value in saved.items() if name != "device"}
    if resume != "latest" or changes.get("output"):
        raise UserError(
            f"nothing to resume: {folders[0]} holds no run; correct the folder, or name --model and --data to start one"
        )
    return {}


def help_text() -> str:
    """The text of `--help`."""
    return make_parser().format_help()


def read_flags(argv: Sequence[str], also: Sequence[str] = ()) -> dict[str, Any]:
    """Every flag given, by its name as spelled (snake case); values are still text. UserError for an unknown flag."""
    parser = make_parser()
    words = [_normal(word) for word in argv]
    namespace, unknown = parser.parse_known_args(words)
    for word in unknown:
        if not word.startswith("--"):
            raise UserError(_unwanted(word, words, parser))
        name = word.split("=")[0]
        like = nearest(name, [*also, *(flag for action in parser._actions for flag in action.option_strings)])
        raise UserError(f"unknown flag {name}: " + (f"did you mean {like}?" if like else "--help lists them all"))
    return vars(namespace)


def _unwanted(word: str, words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """What to write in the place of a `word` that belongs to no flag."""
    switches = {flag for action in parser._actions if action.nargs == 0 for flag in action.option_strings}
    before = next((flag for flag, value in itertools.pairwise(words) if value == word and flag in switches), None)
    if before is None:
        return f"unexpected {word!r}: every value follows a flag (--help lists them)"
    off = "--no-" + before.removeprefix("--").removeprefix("no-")
    other = f"; {off} is its opposite" if off in switches - {before} else ""
    return f"unexpected {word!r}: {before} takes no value, so write {before} alone{other}"


def _normal(word: str) -> str:
    """A word of a command line in its usual spelling: flags in kebab case, --x=true as --x, --x=false as --no-x."""
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    name = name.replace("_", "-")
    spec = _by_spelling().get(name[2:].replace("-", "_"))
    if equals and spec is not None and spec.kind is bool:
        return name if coerce(spec, value) else "--no-" + name[2:]
    return name + equals + value


def _repeated(argv: Sequence[str]) -> list[str]:
    """Lines for the log on flags that are given more than once, with different values: the last one holds."""
    groups: dict[str, list[list[str]]] = {}
    current: list[str] = []
    for word in map(_normal, argv):
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            current = [value] if equals else []
            switched = flag[5:].replace("-", "_") if flag.startswith("--no-") else ""
            if switched in _by_spelling():
                flag, current = "--" + flag[5:], ["no"]
            groups.setdefault(flag, []).append(current)
        else:
            current.append(word)
    return [
        f"{flag} is given {len(values)} times: the last one holds, {' '.join(values[-1]) or 'yes'}"
        for flag, values in groups.items()
        if any(value != values[0] for value in values)
    ]


def _by_spelling() -> dict[str, Spec]:
    return {spelling: spec for spec in specs().values() for spelling in (spec.name, *spec.meta["aliases"])}


def make_parser() -> argparse.ArgumentParser:
    """All flags of the command, with their help."""
    parser = Parser(
        prog="dpo.train",
        usage=USAGE,
        description="Align a text-to-image diffusion model with preference pairs.",
        epilog=EPILOG,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
        formatter_class=_Formatter,
        add_help=False,
    )
    start = parser.add_argument_group("Where to start from")
    start.add_argument("-h", "--help", action="help", help="show this and exit")
    start.add_argument("--preset", metavar="NAME", help=f"a recipe: {', '.join(presets())}")
    start.add_argument("--config", metavar="FILE", help="a TOML file, such as the config.toml of a run")
    start.add_argument(
        "--compat", metavar="PEER", help=f"defaults and meanings of another script: {', '.join(compat.PEERS)}"
    )
    start.add_argument("--print-config", action="store_true", help="show the resulting settings as TOML and exit")
    for group, cls in groups().items():
        section = parser.add_argument_group(cls.__doc__)
        for spec in specs().values():
            if spec.group == group:
                _add_setting(section, spec)
    for name, foreign in compat.FOREIGN.items():
        action = "store_true" if foreign.switch else "store"
        parser.add_argument("--" + name.replace("_", "-"), action=action, help=argparse.SUPPRESS)
    return parser


class _Formatter(argparse.HelpFormatter):
    """argparse's layout, as wide as the terminal, never broken at a hyphen of a flag."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=32, width=min(shutil.get_terminal_size().columns, 130) - 2)

    def _split_lines(self, text: str, width: int) -> list[str]:
        return textwrap.wrap(text, width, break_on_hyphens=False, break_long_words=False)

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)


def _add_setting(section: argparse._ArgumentGroup, spec: Spec) -> None:
    for spelling in (spec.name, *spec.meta["aliases"]):
        text = help_of(spec) if spelling == spec.name else argparse.SUPPRESS
        flag = "--" + spelling.replace("_", "-")
        if spec.kind is bool:
            section.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            section.add_argument(flag, nargs="+" if spec.many else None, metavar=_metavar(spec), help=text)


def help_of(spec: Spec) -> str:
    """One setting's text in --help: doc, unit, default."""
    unit = f" [{spec.meta['unit']}]" if spec.meta["unit"] else ""
    return f"{spec.meta['help']}{unit} (default: {shown(spec.default)})".replace("%", "%%")


def shown(value: Any) -> str:
    """A setting's value as one would type it."""
    if value is None or value == ():
        return "none"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, tuple):
        return " ".join(str(item) for item in value)
    return brief(value)


def _metavar(spec: Spec) -> str:
    if spec.meta["choices"]:
        return "|".join(spec.meta["choices"])
    return {int: "N", float: "X", str: "TEXT"}[spec.kind]
