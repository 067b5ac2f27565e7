"""README.md of a trained pipeline or adapter: a model card in the hub's format, written from the run folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from dpo.common.files import write_text
from dpo.common.words import is_unicode, well_formed
from dpo.methods import own_settings
from dpo.pages import kept
from dpo.pages.figures import CARD_OF_PAIRS, FIGURES, shown
from dpo.pages.folder import ADAPTER_FILE, CARD_FILE, CONFIG_FILE, RunFolder, read_run
from dpo.pages.origin import hub_id, licence, public
from dpo.pages.single import held_things, is_single, things
from dpo.pages.verdict import verdict, warnings
from dpo.settings.families import PIPELINES

REPEAT = f"python -m dpo.train --config {CONFIG_FILE} --output ANOTHER_FOLDER"


SETTINGS = (
    "method", "beta", "target_gradient_factor", "loss", "loss_alpha", "safeguard", "kto_center",
    "kto_liked_weight", "kto_disliked_weight", "mapo_weight",
    "mapo_scale", "label_smoothing", "sft_weight", "norm_penalty", "gamma", "learning_rate", "scheduler", "warmup", "optimizer",
    "weight_decay", "max_grad_norm", "ema", "batch_size", "accumulation", "steps", "resolution", "caption_dropout",
    "precision", "unet_init", "lora_init",
)  # fmt: skip


FEW = "turbo"  # of the setting `timesteps`
PLACES = ("unet_init", "lora_init")  # of SETTINGS: what names a place


def write_model_card(run_folder: Path | str) -> Path:
    """Writes README.md into a run folder, in one step; its path.

    Raises UserError when there is no run in the folder.
    """
    run = read_run(run_folder)
    path = run.folder / CARD_FILE
    write_text(path, well_formed(model_card(run)))
    return path


def model_card(run: RunFolder) -> str:
    """The card: front matter, what it is, how to use it, training, figures and how far to trust them."""
    sections = [
        _front_matter(run),
        f"# {_inline(_title(run))}\n\n{_introduction(run)}",
        _pictures(run),
        f"## Use\n\n```python\n{usage(run)}\n```",
        f"## Training\n\n{_table(_training(run))}",
        f"## Figures\n\n{_table(_figures(run))}\n\n{_reading(run)}",
        f"## How to repeat it\n\n```bash\n{REPEAT}\n```\n\n{_versions(run)}",
        f"## Papers\n\n{_papers(run)}",
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _front_matter(run: RunFolder) -> str:
    """The card's metadata as YAML; every text is written as a JSON string, which is valid YAML."""
    base, data = hub_id(run.setting("model")), hub_id(run.setting("data"))
    tags = [
        "text-to-image",
        "diffusers",
        "preference-alignment",
        "diffusion-dpo" if run.method == "dpo" else run.method,
    ]
    tags += ["lora"] if run.lora else []
    fields: dict[str, Any] = {"library_name": "diffusers", "pipeline_tag": "text-to-image", "tags": tags}
    if (terms := licence(run)) is not None:
        fields["license"] = terms.license
        fields |= {"license_name": terms.name, "license_link": terms.link} if terms.link else {}
    if base:
        fields |= {"base_model": base, "base_model_relation": "adapter" if run.lora else "finetune"}
    if data:
        fields["datasets"] = [data]
    return (
        "---\n"
        + "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items())
        + "\n---"
    )


def _title(run: RunFolder) -> str:
    return str(run.setting("run_name") or f"{_base(run).rpartition('/')[2]} aligned by {run.method_name}")


def _introduction(run: RunFolder) -> str:
    rank = "" if run.setting("lora_init") else f" of rank {run.setting('rank')}"  # that of both where one was merged
    what = f"A LoRA adapter{rank} for" if run.lora else "A fine-tuned copy of"
    data = public(run.setting("data")) or "the pairs of the embedded world"
    how = "trained on the preferred images of" if run.row.images == "winner" else "aligned with the preferences in"
    how = "aligned with the labels of the images in" if is_single(run) else how
    state = (
        ""
        if run.status == "finished"
        else f" The training was {run.status} after {run.done:,} of {run.wanted:,} updates."
    )
    return (
        f"{what} `{_code(_base(run))}`, {how} `{_code(data)}` by {run.method_name}.{_started(run)}{state}{_terms(run)}"
    )


def _base(run: RunFolder) -> str:
    """The model as others may read it."""
    return run.model_name if run.embedded else public(run.model_name) or run.model_name


def _terms(run: RunFolder) -> str:
    """What the front matter cannot say of the licence: none is known, and the hub asks for one."""
    if licence(run) is not None:
        return ""
    return (
        f" The licence of `{_code(_base(run))}` holds for what was made from it; it is not known here: put it into the "
        "front matter above, as `license:`."
    )


def _started(run: RunFolder) -> str:
    """What the training began with, and what of it the saved result contains."""
    sentences = ""
    if unet := run.setting("unet_init"):
        sentences += f" The training began with the weights `{_code(public(unet))}`."
    if adapter := run.setting("lora_init"):
        whole = ", which is part of this adapter: do not load it as well" if run.lora else ""
        sentences += f" The training began with the LoRA `{_code(public(adapter))}`{whole}."
    return sentences


def _pictures(run: RunFolder) -> str:
    if not run.grids:
        return ""
    return f"![The same prompts and seeds before and after the training](samples/{kept.grids(run)[-1].name})"


def usage(run: RunFolder, place: str = "THIS_FOLDER_OR_REPOSITORY", *, here: bool = False) -> str:
    """Python that draws an image with the result, which lies at `place`; here: other files by their paths on this machine."""
    if not run.lora:
        return (
            "from diffusers import DiffusionPipeline\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({_literal(place)}{_absent(run)})\nimage = {_call(run)}"
        )
    unet = run.setting("unet_init")
    begun = (
        f"# first put the weights of {_code(_here(unet) if here else public(unet))} into the pipeline: the adapter was trained on them\n"
        if unet
        else ""
    )
    kind, loaded = _loaded(run, here)
    within = run.embedded  # the package has its model, and knows where
    return (
        f"from diffusers import {kind}\n"
        + ("from dpo.tiny.paths import pipeline_path\n" if within else "")
        + f"\npipe = {kind}.{loaded}\n"
        f"{begun}{_scheduler(run)}"
        f'pipe.load_lora_weights({_literal(place)}, weight_name="{ADAPTER_FILE}")\n'
        f"image = {_call(run)}"
    )


def _literal(text: str) -> str:
    """A text as Python writes it, in letters of any language where it is Unicode."""
    return json.dumps(text, ensure_ascii=not is_unicode(text))


def _call(run: RunFolder) -> str:
    """The call that draws: captions as long as in training where that is not the encoder's own, few steps as the run's own."""
    told = {"max_sequence_length": run.setting("text_tokens") or None}
    if run.setting("timesteps") == FEW:
        scale = "true_cfg_scale" if run.setting("family") == "qwen" else "guidance_scale"
        told |= {"num_inference_steps": run.setting("sample_steps"), scale: run.setting("sample_guidance")}
    return f'pipe(prompt="a prompt"{"".join(f", {name}={x:g}" for name, x in told.items() if x is not None)}).images[0]'


def _here(name: Any) -> str:
    """A hub id as it is, of a path the whole."""
    return hub_id(name) or str(Path(str(name)).expanduser().resolve())


def _loaded(run: RunFolder, here: bool) -> tuple[str, str]:
    """The class of the base's pipeline, and the call that loads the base."""
    name = _base(run) if hub_id(run.setting("model")) else f"PATH_TO/{_base(run)}"
    name = _here(run.setting("model")) if here else name
    if run.embedded:
        return "DiffusionPipeline", "from_pretrained(pipeline_path())"
    if name.endswith(".safetensors"):  # the class that finds out the kind by itself does not read one file
        family = (run.summary.get("model") or {}).get("family")
        return PIPELINES.get(str(family), PIPELINES["sd"]), f"from_single_file({_literal(name)})"
    return "DiffusionPipeline", f"from_pretrained({_literal(name)}{_absent(run)})"


def _absent(run: RunFolder) -> str:
    """The arguments without which diffusers does not load a pipeline that came without some of its parts."""
    return "".join(f", {name}=None" for name in run.summary.get("absent") or {})


def _scheduler(run: RunFolder) -> str:
    """The lines that give the base model the scheduler that an adapter was trained by; none where it is the base's."""
    changed = dict(run.summary.get("scheduler") or {})
    if not changed:
        return ""
    kind = changed.pop("_class_name", None)
    imported = f"from diffusers import {kind}\n" if kind else ""
    options = "".join(f", {name}={value!r}" for name, value in changed.items())
    return f"{imported}pipe.scheduler = {kind or 'type(pipe.scheduler)'}.from_config(pipe.scheduler.config{options})\n"


def _training(run: RunFolder) -> list[tuple[str, Any]]:
    unused = own_settings() - run.row.settings
    rows = [
        (name.replace("_", " "), public(run.setting(name)) if name in PLACES else run.setting(name))
        for name in SETTINGS
        if name not in unused and run.setting(name) != 0
    ]
    if (end := run.setting("window_high")) is not None:  # the timestep after the last
        few = "four of a distilled model, of " if run.setting("timesteps") == FEW else ""
        rows.append(("timesteps", f"{few}{run.setting('window_low', 0)} to {end - 1}"))
    rows += [
        (f"data: {name}".replace("pairs", things(run)), value)
        for name, value in (run.summary.get("data") or {}).items()
        if value
    ]
    return [
        ("updates made", run.done),
        ("update that is kept", kept.kept_update(run)),
        (f"{things(run)} seen", run.pairs_seen()),
        *rows,
        ("seed", run.setting("seed")),
    ]


def _figures(run: RunFolder) -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    if (event := kept.validation(run)) is not None:
        low, high = event.get("heldout_interval") or (None, None)
        interval = (
            f" (95 %: {low:.3f} to {high:.3f}, {event.get('heldout_pairs')} {held_things(run)})"
            if low is not None
            else ""
        )
        share = shown("heldout_accuracy", event.get("heldout_accuracy", 0.5))
        rows.append((FIGURES["heldout_accuracy"].card, share + interval))
    if chosen := kept.kept(run):
        share = (
            f"{shown('heldout_accuracy', chosen['choosing_accuracy'])} ({chosen['choosing_pairs']} {held_things(run)})"
        )
        rows.append(("the same of the half that chose the update", share))
    names = (*CARD_OF_PAIRS, "loss") if run.pairwise else ("loss",)
    rows += [(FIGURES[name].card.replace("pairs", things(run)), run.late(name)) for name in names]
    rows += [(name.replace("_", " "), value) for name, value in run.evaluation.items()]
    return rows


def _reading(run: RunFolder) -> str:
    found = verdict(run)
    caveats = [f"- {_inline(warning.title)}. {_inline(warning.text)}" for warning in warnings(run)]
    return "\n\n".join(
        filter(None, [f"**{_inline(found.headline)}** {_inline(' '.join(found.sentences))}", "\n".join(caveats)])
    )


def _versions(run: RunFolder) -> str:
    versions = run.summary.get("versions") or {}
    parts = [str(run.summary["device"])] if run.summary.get("device") else []
    return _inline(", ".join(parts + [f"{name} {version}" for name, version in versions.items()]))


def _papers(run: RunFolder) -> str:
    papers = [*run.row.papers, run.shape.paper if run.shape else None]
    lines = [f"- {one.title}, [arXiv:{one.arxiv}](https://arxiv.org/abs/{one.arxiv})" for one in papers if one]
    return "\n".join(lines) or "None."


def _table(rows: list[tuple[str, Any]]) -> str:
    known = [(name, value) for name, value in rows if value is not None]
    lines = [f"| {_cell(name)} | {_cell(_text(value))} |" for name, value in known]
    return "\n".join(["| | |", "|---|---|", *lines])


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, (list, tuple)):
        return ", ".join(_text(item) for item in value)
    return str(value)


def _cell(text: str) -> str:
    return _inline(text).replace("|", "\\|")


def _inline(text: str) -> str:
    """A user's text on one line of Markdown, with HTML escaped."""
    return " ".join(str(text).split()).replace("&", "&amp;").replace("<", "&lt;")


def _code(text: Any) -> str:
    return " ".join(str(text).split()).replace("`", "'")
