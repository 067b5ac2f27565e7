"""A run folder: the list of its files (ENTRIES), and its content, from which report, plots and model card are made.

    config.toml       every setting, by group (dpo.settings.config.to_toml)
    metrics.jsonl     one line per update, and events (dpo.training.trackers); "validation" has the held-out accuracy,
                      "started" the loss and its pull before the first update (dpo.training.outset)
    summary.json      how the run went; every key may be missing:
        status        "finished", "interrupted" or "failed"; reason: one line for the last two
        steps         updates wanted;  done: updates made;  taken: pairs of these, also those that could not be used
        seconds: duration of the last start;  started: ISO time
        device, versions {name: version}
        made_from     checksums of the weights that the run began with (dpo.pages.began)
        model         {name: value}, shown as it is (family, prediction type, parameters, trainable parameters, ...)
        data          {name: value}, shown as it is; "usable" is the number of training pairs, SHARED of held-out ones
        processes     number of processes that shared the work, 1 if missing
        evaluation    win_rate, win_rate_interval [low, high], prompts, score_before, score_after, judge, and of further
                      scorers faithfulness_before, faithfulness_after, win_rate_by_<scorer>
        kept          of --keep-best: step, the update whose weights are the result; choosing_accuracy, heldout_accuracy, ...
        result        of which update the result in the folder is, whatever became of the run since (dpo.pages.standing)
        notes, warnings   lists of lines
    tables.json       weight, precision, table, correction: [T] each (methods dde*); weight for the others too
    samples/*.png     grids of dpo.drawing.grid, in the order of their names

Everything but the folder itself may be missing: a run that was killed early, or is still going on, can be read too.
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dpo.common.errors import UserError, reading
from dpo.methods import METHODS, SHAPES, Method, Shape, Start
from dpo.pages import kinds
from dpo.pages.figures import DECILES

CONFIG_FILE = "config.toml"
METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
TABLES_FILE = "tables.json"
REPORT_FILE = "report.html"
CARD_FILE = "README.md"
INDEX_FILE = "model_index.json"
ADAPTER_FILE = "pytorch_lora_weights.safetensors"
CURVES_FILE, DECILES_FILE, DDE_FILE = "curves.png", "deciles.png", "dde.png"
FAILED_FILE = "failed.txt"
WANDB_ID_FILE = "wandb_id.txt"
CHECKPOINTS, SAMPLES, TENSORBOARD, EVALUATION = "checkpoints", "samples", "tensorboard", "evaluation"


SHARED = "held out with a caption trained on"  # of "data" in SUMMARY_FILE: a number of pairs

MODULE = ("config.json", "diffusion_pytorch_model*.safetensors*")
ENCODER = ("config.json", "model*.safetensors*")
TOKENS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
)


class Entry(NamedTuple):
    """A file or a folder that a run leaves in its output folder."""

    name: str
    what: str
    writer: str  # the file of dpo/ that writes it
    folder: bool = False
    inside: tuple[str, ...] = ()  # what a run puts into this folder; the rest is the user's
    guarded: bool = True  # where there is no run it is somebody's, and a run that would replace it is refused
    early: bool = False  # a start that was interrupted leaves it, beside its METRICS_FILE
    uploaded: bool = False  # --push-to-hub takes it along; the result itself is taken as it was written
    beside: str = ""  # part of a result: a run wrote the entry only where this file lies beside it


ENTRIES = (
    Entry(CONFIG_FILE, "every setting, by group", "training/loop.py", uploaded=True),
    Entry(METRICS_FILE, "one line per update, and events", "training/trackers.py", early=True, uploaded=True),
    Entry(
        CHECKPOINTS,
        "to resume from",
        "training/checkpoint.py",
        folder=True,
        inside=(f"step-{'[0-9]' * 8}", ".step-*.part-*", "abandoned-[0-9]*"),
    ),
    Entry(
        SAMPLES,
        "images before, during and after",
        "training/samples.py",
        folder=True,
        inside=(f"step-{'[0-9]' * 8}.png", f"before/{'[0-9]' * 3}.png"),
        early=True,
        uploaded=True,
    ),
    Entry(
        EVALUATION,
        "the result against its start: page, figures, images",
        "training/judging.py",
        folder=True,
        inside=(
            "evaluation.json",
            "evaluation.md",
            "evaluation.html",
            "scores.sqlite*",
            "prompts.jsonl",
            "images/*/protocol.json",
            "images/*/images/*.png",
            "images/*/sheets/*.png",
        ),
    ),
    Entry(SUMMARY_FILE, "how the run went", "training/summary.py", uploaded=True),
    Entry(TABLES_FILE, "weight and correction by timestep", "training/summary.py", uploaded=True),
    Entry(CARD_FILE, "the model card", "pages/card.py", uploaded=True),
    Entry(REPORT_FILE, "the page for a person", "pages/report.py", uploaded=True),
    Entry(CURVES_FILE, "curves over the updates", "pages/plots.py", uploaded=True),
    Entry(DECILES_FILE, "figures by tenth of the clock", "pages/plots.py", uploaded=True),
    Entry(DDE_FILE, "credit by timestep", "pages/plots.py", uploaded=True),
    Entry(INDEX_FILE, "the parts of the pipeline", "models/save.py", beside=INDEX_FILE),
    Entry(ADAPTER_FILE, "the adapter, instead of a pipeline", "models/lora.py", beside=ADAPTER_FILE),
    Entry("unet", "the aligned UNet", "models/save.py", folder=True, inside=MODULE, beside=INDEX_FILE),
    Entry("transformer", "the aligned one (flow)", "models/save.py", folder=True, inside=MODULE, beside=INDEX_FILE),
    Entry("vae", "as in the model", "models/save.py", folder=True, inside=MODULE, beside=INDEX_FILE),
    Entry("text_encoder", "as in the model", "models/save.py", folder=True, inside=ENCODER, beside=INDEX_FILE),
    Entry("text_encoder_2", "as in the model (SDXL)", "models/save.py", folder=True, inside=ENCODER, beside=INDEX_FILE),
    Entry("text_encoder_3", "as in the model (SD 3)", "models/save.py", folder=True, inside=ENCODER, beside=INDEX_FILE),
    Entry("tokenizer", "as in the model", "models/save.py", folder=True, inside=TOKENS, beside=INDEX_FILE),
    Entry("tokenizer_2", "as in the model (SDXL)", "models/save.py", folder=True, inside=TOKENS, beside=INDEX_FILE),
    Entry("tokenizer_3", "as in the model (SD 3)", "models/save.py", folder=True, inside=TOKENS, beside=INDEX_FILE),
    Entry(
        "scheduler",
        "as in the model",
        "models/save.py",
        folder=True,
        inside=("scheduler_config.json",),
        beside=INDEX_FILE,
    ),
    Entry(
        TENSORBOARD,
        "its events",
        "training/trackers.py",
        folder=True,
        inside=("events.out.tfevents.*",),
        early=True,
    ),
    Entry(
        "wandb",
        "its own files",
        "training/trackers.py",
        folder=True,
        inside=("run-*", "offline-run-*", "latest-run", "debug*.log"),
        early=True,
    ),
    Entry(WANDB_ID_FILE, "the W&B run that a resumed run goes on with", "training/trackers.py", early=True),
    Entry(FAILED_FILE, "why a run of a sweep failed", "sweep.py", guarded=False),
)


def holds_run(folder: Path) -> bool:
    """Whether there is a run of this trainer in `folder`: its settings, or a checkpoint that says what it is."""
    settings = _settings(folder / CONFIG_FILE)
    if all(name in settings.get(group, ()) for group, name in (("method", "method"), ("output", "checkpoint_every"))):
        return True
    return any("format" in read_json(path) for path in (folder / CHECKPOINTS).glob("step-*/state.json"))


def read_settings(folder: Path) -> dict[str, dict[str, Any]]:
    """The settings by group of the run in `folder`; empty where there is none."""
    try:
        return _settings(folder / CONFIG_FILE) if holds_run(folder) else {}
    except OSError:  # a name may be too long to be asked for
        return {}


def not_of_a_run(folder: Path) -> list[str]:
    """The entries in `folder` that no run of this trainer wrote and a run would replace: another trainer's, a model's.

    None where it holds a run; of a start that was interrupted early, all but what that leaves. Empty folders are free.
    """
    if holds_run(folder):
        return []
    left = _begun(folder / METRICS_FILE)
    there = [entry for entry in ENTRIES if entry.guarded and _occupied(folder / entry.name)]
    return [entry.name for entry in there if not (left and entry.early)]


def _begun(metrics: Path) -> bool:
    """Whether a run opened this metrics file: it is empty still, or its first line says that the run started."""
    first = next(iter(read_records(metrics)), {})
    return metrics.is_file() and (not metrics.stat().st_size or first.get("event") == "started")


def _occupied(place: Path) -> bool:
    """Whether there is anything; an empty folder, also behind a link, was made for the run to come."""
    return any(place.iterdir()) if place.is_dir() else place.exists() or place.is_symlink()


def own_files(folder: Path) -> list[str]:
    """The names of a run's records, pages and images in `folder`, the result left out: what goes to the hub beside it.

    Links are left out: no run writes one.
    """
    names = [entry.name for entry in ENTRIES if entry.uploaded and not entry.folder]
    for entry in ENTRIES:
        if entry.uploaded and entry.folder:
            found = [path for pattern in entry.inside for path in (folder / entry.name).glob(pattern)]
            names += sorted(path.relative_to(folder).as_posix() for path in found)
    return [name for name in names if (folder / name).is_file() and not (folder / name).is_symlink()]


LATE = 0.2  # "at the end of the run" means the last fifth of its updates


class RunFolder(NamedTuple):
    """A run, read from its folder."""

    folder: Path
    settings: dict[str, dict[str, Any]]  # by group
    summary: dict[str, Any]
    updates: list[dict[str, Any]]  # by step, ascending
    events: list[dict[str, Any]]
    tables: dict[str, np.ndarray]  # [T] float64 each
    grids: list[Path]

    @property
    def timestep_count(self) -> int:
        """T of the model's schedule, told by the tables; 1000, nearly every model's, in a run that was cut off before them."""
        return max(map(len, self.tables.values()), default=1000)

    def setting(self, name: str, default: Any = None) -> Any:
        """A setting by its name, whichever group holds it."""
        return next((group[name] for group in self.settings.values() if name in group), default)

    def learning_rate(self) -> float | None:
        """The peak learning rate that the optimizer saw."""
        rate = self.setting("learning_rate")
        return rate * (self.effective_batch() if self.setting("scale_lr") else 1) if rate else None

    def effective_batch(self) -> int:
        """Pairs per update; runs of earlier versions say only how they come about."""
        passes = int(self.setting("batch_size", 1)) * int(self.setting("accumulation", 1))
        return int(self.setting("effective_batch") or passes * int(self.summary.get("processes", 1)))

    @property
    def method(self) -> str:
        return str(self.setting("method", "dpo"))

    @property
    def row(self) -> Method:
        """The method's row in METHODS; for a method that this version does not know, dpo's row under that name."""
        return METHODS.get(self.method) or replace(METHODS["dpo"], name=self.method, title=self.method)

    @property
    def shape(self) -> Shape | None:
        """That of the pairwise loss; None for another loss, or one that this version does not know."""
        return SHAPES.get(str(self.setting("loss", "sigmoid"))) if "loss" in self.row.settings else None

    @property
    def method_name(self) -> str:
        return f"{self.row.title}, {self.shape.title} loss" if self.shape and self.shape.title else self.row.title

    @property
    def pairwise(self) -> bool:
        """Whether there are a reference and a margin to show."""
        return self.row.reference

    @property
    def start(self) -> Start | None:
        """The loss before the first update and the pull of a pair then, with the labels of its last start; None if not known."""
        told = [event for event in self.events if event.get("start_pull") is not None]
        if told:
            return Start(told[-1].get("start_loss"), told[-1]["start_pull"])
        if self.shape is None or self.setting("sft_weight"):  # of an earlier version, which does not say it
            return None
        found = self.shape.start_of(self.setting("loss_alpha"), 1 - 2 * (self.setting("label_smoothing") or 0.0))
        first = self.updates[0] if self.updates and self.updates[0]["step"] == 1 else {}  # made where all logits are 0
        pull = first.get("gradient_factor")
        return found if pull is None else found._replace(pull=pull)

    @property
    def lora(self) -> bool:
        return bool(self.setting("lora", False))

    @property
    def model_name(self) -> str:
        return "the embedded world" if self.embedded else str(self.setting("model"))

    @property
    def embedded(self) -> bool:
        """Whether the model is the one inside the package."""
        name = str(self.setting("model") or "")
        return not name or Path(name).parts[-3:] == ("tiny", "assets", "pipeline")

    @property
    def done(self) -> int:
        """Updates made, whether or not each has a line: --log-every leaves some out, and another folder may have them."""
        said = self.summary.get("done", self.summary.get("steps") if self.status == "finished" else None)
        return max(int(said or 0), int(self.updates[-1]["step"]) if self.updates else 0)

    @property
    def whole(self) -> bool:
        """Whether every update that was made has a line."""
        return len(self.updates) == self.done

    @property
    def wanted(self) -> int:
        return int(self.summary.get("steps") or self.setting("steps") or self.done)

    @property
    def status(self) -> str:
        """One of "finished", "interrupted" and "failed"; "interrupted" too where there is no summary (yet)."""
        return str(self.summary.get("status", "interrupted"))

    @property
    def validations(self) -> list[dict[str, Any]]:
        return [event for event in self.events if event.get("event") == "validation"]

    @property
    def evaluation(self) -> dict[str, Any]:
        return dict(self.summary.get("evaluation") or {})

    def series(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps [N] and values [N] of a figure, the updates without it left out."""
        pairs = [(one["step"], one[name]) for one in self.updates if isinstance(one.get(name), (int, float))]
        steps, values = zip(*pairs, strict=True) if pairs else ((), ())
        return np.array(steps, dtype=float), np.array(values, dtype=float)

    def late(self, name: str) -> float | None:
        """Mean of a figure over the last fifth of the run."""
        _, values = self.series(name)
        return float(values[-max(1, round(len(values) * LATE)) :].mean()) if len(values) else None

    def total(self, name: str) -> int:
        """The sum of a count over the updates with a line."""
        return int(sum(update.get(name) or 0 for update in self.updates))

    def pairs_seen(self) -> int | None:
        """The pairs that were trained on; where lines are missing all that came up, and None where nothing says how many."""
        if self.whole:
            return self.total("pairs")
        return self.summary.get("taken") if self.summary.get("done") == self.done else None

    def late_deciles(self, name: str) -> np.ndarray:
        """A `<name>_by_decile` figure [10] over the last fifth, weighted by the updates' pairs; nan without a value."""
        late = self.updates[-max(1, round(len(self.updates) * LATE)) :]
        empty: list[Any] = [None] * DECILES
        values = np.array([update.get(f"{name}_by_decile") or empty for update in late], dtype=float).reshape(
            -1, DECILES
        )
        ones = [1] * DECILES
        weights = np.array([update.get("pairs_by_decile") or ones for update in late], dtype=float).reshape(-1, DECILES)
        weights = np.where(np.isfinite(values), weights, 0.0)
        total = weights.sum(0)
        sums = (np.nan_to_num(values) * weights).sum(0)
        return np.where(total > 0, sums / np.where(total > 0, total, 1.0), np.nan)


def read_run(folder: Path | str) -> RunFolder:
    """Reads a run folder. Raises UserError when there is no run in it, or a value in its files is of a wrong kind."""
    folder = Path(folder)
    with reading(str(folder), "name a run's output folder"):  # a name may be too long to be asked for
        there = (folder / METRICS_FILE).is_file() or (folder / CONFIG_FILE).is_file()
    if not there:
        raise UserError(
            f"{folder} holds no run: it has neither {CONFIG_FILE} nor {METRICS_FILE}; name a run's output folder"
        )
    records = []
    for line, record in numbered_records(folder / METRICS_FILE):
        kinds.check_record(record, f"{folder / METRICS_FILE}, line {line}")
        records.append(record)
    by_step = {record["step"]: record for record in records if "event" not in record and record.get("step") is not None}
    summary, tables, settings = (
        read_json(folder / SUMMARY_FILE),
        read_json(folder / TABLES_FILE),
        _settings(folder / CONFIG_FILE),
    )
    kinds.check_summary(summary, str(folder / SUMMARY_FILE))
    kinds.check_tables(tables, str(folder / TABLES_FILE))
    kinds.check_settings(settings, str(folder / CONFIG_FILE))
    return RunFolder(
        folder=folder,
        settings=settings,
        summary=summary,
        updates=[by_step[step] for step in sorted(by_step)],
        events=[record for record in records if "event" in record],
        tables={name: np.array(values, dtype=float) for name, values in tables.items() if values is not None},
        grids=sorted((folder / SAMPLES).glob("*.png")),
    )


def read_json(path: Path) -> dict[str, Any]:
    """An object of a run folder, without its nulls; empty where the file is missing or damaged."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    found = found if isinstance(found, dict) else {}
    return {name: value for name, value in found.items() if value is not None}


def _settings(path: Path) -> dict[str, dict[str, Any]]:
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return {group: values for group, values in found.items() if isinstance(values, dict)}


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """The objects of a metrics file, one a line, in order; a line torn by a kill is left out.

    Empty for a missing file.
    """
    return [record for _, record in numbered_records(path)]


def numbered_records(path: Path | str) -> list[tuple[int, dict[str, Any]]]:
    """The same, each with the number of its line, from 1."""
    path = Path(path)
    records: list[tuple[int, dict[str, Any]]] = []
    if not path.exists():
        return records
    with path.open(encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(record, dict):
                records.append((number, record))
    return records
