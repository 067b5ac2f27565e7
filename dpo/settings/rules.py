"""What does not go together, what has no effect, and what may change on resume.

Settings come as flat mappings (`dpo.settings.config.flatten`): config.py asks this file, not the other way round.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from types import SimpleNamespace
from typing import Any

from dpo.methods import METHODS, SHAPES, constants, own_settings
from dpo.settings.fields import Spec, brief

BLOCK = re.compile(r"down_blocks\.\d+|mid_block|up_blocks\.\d+")
FOLDER = re.compile(r"[\w=+,-](?:[\w .=+,-]{0,98}[\w=+,-])?")  # on every system
DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")
ADAPTER = ("rank", "alpha", "target_modules", "lora_dropout", "lora_format")  # read with --lora alone
DRAWN = ("sample_every", "sample_prompts", "sample_seeds", "sample_steps", "sample_guidance", "sample_batch")
ADAM = ("adam_beta1", "adam_beta2", "eps")
AUTOCAST = {"fp32", "bf16", "fp16"}  # precisions that keep fp32 weights
REFUSED = {"label_smoothing", "sft_weight"}  # refused, not only noted, with a method that does not read them


def contradictions(values: Mapping[str, Any]) -> list[str]:
    """Messages on settings that do not go together; `values` has every setting by its flat name."""
    return [message for broken, message in _combinations(SimpleNamespace(**values)) if broken]


def _combinations(v: SimpleNamespace) -> list[tuple[object, str]]:
    """Each rule as (whether it is broken, the message)."""
    high = 1000 if v.window_high is None else v.window_high
    method = METHODS[v.method]
    blocks = v.checkpointing.split(",")
    return [
        (v.window_low >= high, f"window_low = {v.window_low} must be below window_high = {high}"),
        (v.label_smoothing >= 0.5, "label_smoothing = 0.5 leaves nothing to learn: use less"),
        (
            v.validation_fraction and v.validation_data,
            "validation_data and validation_fraction are two ways to say the same: give one",
        ),
        ((v.resolution or 8) % 8, f"resolution = {v.resolution}: expected a multiple of 8"),
        (
            "loss" not in method.settings and v.loss != "sigmoid",
            f"loss = {v.loss} compares pairs: it means nothing with method {v.method}",
        ),
        *_constant(v),
        (
            v.method == "kto"
            and v.kto_center == "batch"
            and (v.accumulation > 1 or (v.effective_batch or v.batch_size) != v.batch_size or v.buckets),
            "kto_center = batch depends on how an update is cut, so an update must be one pass: use --kto-center update, or "
            "--accumulation 1, no --effective-batch and no --buckets",
        ),
        (
            v.method == "kto" and not (v.kto_liked_weight or v.kto_disliked_weight),
            "kto_liked_weight and kto_disliked_weight are both 0, which leaves nothing to learn: raise one",
        ),
        (
            (v.single_image_column or v.liked_column) and (v.chosen_column or v.rejected_column),
            "single_image_column and liked_column are of images without a partner, chosen_column and rejected_column of pairs: give "
            "those of one kind",
        ),
        (
            v.target_gradient_factor is not None and ("loss" not in method.settings or v.loss != "sigmoid"),
            f"target_gradient_factor is of the sigmoid's slope, and this is {v.loss if 'loss' in method.settings else v.method}: "
            "leave it out",
        ),
        (
            v.norm_penalty and not method.reference,
            f"norm_penalty compares with a reference, which method {v.method} does not have: leave it at 0",
        ),
        (
            v.norm_penalty and v.reference == "recorded",
            "norm_penalty compares predictions, which recorded errors do not have: leave it at 0, or use --reference auto",
        ),
        (
            "sft_weight" not in method.settings and v.sft_weight,
            f"sft_weight adds to a preference loss: with method {v.method} leave it at 0",
        ),
        (
            "label_smoothing" not in method.settings and v.label_smoothing,
            f"label_smoothing needs preferences: with method {v.method} leave it at 0",
        ),
        (
            not method.reference and v.reference == "recorded",
            f"method {v.method} has no reference: leave --reference at auto",
        ),
        (v.reference == "adapter" and not v.lora, "reference = adapter needs --lora: without it use copy or auto"),
        (
            v.reference == "adapter" and v.unet_init and v.reference_model == "base",
            "reference_model = base differs from the adapters' UNet when --unet-init is given: use --reference copy",
        ),
        (
            v.precision == "fp64" and v.optimizer not in ("auto", "adamw"),
            f"precision = fp64 needs optimizer adamw, not {v.optimizer}",
        ),
        (
            v.precision == "bf16-pure" and not v.lora and v.optimizer not in ("auto", "adamw8bit"),
            f"precision = bf16-pure needs optimizer adamw8bit, which rounds stochastically: {v.optimizer} would lose small updates",
        ),
        (
            v.checkpointing not in ("off", "on", "auto") and not all(BLOCK.fullmatch(block) for block in blocks),
            f"checkpointing = {v.checkpointing}: expected off, on, auto or UNet blocks such as down_blocks.0,mid_block,up_blocks.3",
        ),
        (not DEVICE.fullmatch(v.device), f"device = {v.device}: expected auto, cpu, cuda or cuda:N"),
        (v.device == "cpu" and v.kernels == "triton", "kernels = triton needs a GPU: use torch or auto"),
        (
            v.deterministic and v.attention == "xformers",
            "deterministic needs an attention whose backward pass sums in one order: use --attention sdpa",
        ),
        (v.resume and v.overwrite, "--resume continues a run and --overwrite replaces it: give one"),
        (
            v.gradient_release and v.effective_batch and v.effective_batch != v.batch_size,
            f"gradient_release makes an update of every pass, so effective_batch = {v.effective_batch} with batch_size = "
            f"{v.batch_size} cannot be: leave --gradient-release out, or give both as the largest number that fits",
        ),
        (
            v.gradient_release and v.accumulation > 1,
            f"gradient_release makes an update of every pass, so accumulation = {v.accumulation} cannot be: "
            "leave --gradient-release out, or use --accumulation 1 and the largest --batch-size that fits",
        ),
        (
            v.gradient_release and v.optimizer not in ("auto", "adamw8bit", "adamw"),
            f"gradient_release needs optimizer adamw8bit or adamw: {v.optimizer} cannot leave out a gradient that is not finite",
        ),
        (
            v.gradient_release and v.precision == "fp16",
            "gradient_release cannot scale the loss, which precision = fp16 needs: use --precision bf16 or bf16-pure",
        ),
        (
            v.activation_offload and v.compile,
            "activation_offload moves what uncompiled code keeps for the backward pass: leave it or --compile out",
        ),
        (
            v.keep_encoded == "on" and v.crop == "random",
            "keep_encoded = on keeps one crop of each image, and crop = random cuts another in each epoch: leave one at auto or center",
        ),
        (
            v.buckets and v.compile,
            "compile makes code for minutes for each shape, and buckets has up to a dozen: leave --compile or --buckets out",
        ),
        (
            v.buckets and v.gradient_release,
            "gradient_release makes an update of one pass, and buckets needs a pass for each shape: leave one of them out",
        ),
        (
            v.steps is not None and v.epochs is not None,
            f"steps = {v.steps} and epochs = {brief(v.epochs)} both say how long a run is: give one",
        ),
        (
            v.run_name is not None and not FOLDER.fullmatch(v.run_name),
            f"run_name = {brief(v.run_name)}: it names a folder, so use letters, digits, spaces and . _ - = + , alone, and no dot or "
            "space at its ends",
        ),
        (
            v.keep_best and v.validate_every == 0,
            "keep_best chooses by held-out accuracies, and validate_every = 0 makes none: leave one of them out",
        ),
        (
            v.keep_best and v.validation_fraction == 0 and v.validation_data is None,
            "keep_best chooses by held-out accuracy, and validation_fraction = 0 holds no pairs out: leave one of them out",
        ),
        *((v.cuda_graph and broken, f"cuda_graph {message}") for broken, message in _captured(v)),
        *((v.sharding == "on" and broken, f"sharding = on {message}") for broken, message in _sharded(v)),
    ]


def _constant(v: SimpleNamespace) -> list[tuple[object, str]]:
    """What does not go together with the shape of the pairwise loss and its constant."""
    alpha = SHAPES[v.loss].alpha
    if v.loss_alpha is not None and alpha is None:
        return [(True, f"loss = {v.loss} has no constant: leave --loss-alpha out (those with one: {constants()})")]
    outside = v.loss_alpha is not None and alpha is not None and not alpha.low < v.loss_alpha < alpha.high
    return [
        (
            outside,
            f"loss_alpha = {brief(v.loss_alpha)}: with loss {v.loss}, {alpha.words}, above {brief(alpha.low)} and below "
            f"{brief(alpha.high)}"
            if alpha is not None
            else "",
        ),
        (
            v.label_smoothing and v.loss == "robust",
            "label_smoothing and loss = robust both say how many labels are wrong: give one (--loss-alpha, or --loss sigmoid)",
        ),
        (
            v.label_smoothing and v.loss == "smpo",
            "loss = smpo reads soft labels, and label_smoothing makes all alike: leave --label-smoothing at 0",
        ),
    ]


def _sharded(v: SimpleNamespace) -> list[tuple[object, str]]:
    """What does not go together with sharding: (whether it is so, the rest of the message)."""
    return [
        (v.lora, "is for all weights: adapters are small, so leave --sharding off and each process holds them whole"),
        (
            v.optimizer not in ("auto", "adamw", "adamw8bit"),
            f"needs optimizer adamw or adamw8bit: {v.optimizer} works on whole tensors",
        ),
        (
            v.precision == "fp16",
            "cannot scale the loss, which precision = fp16 needs: use --precision bf16 or bf16-pure",
        ),
        (v.compile, "gathers weights between compiled blocks, which is not tried: leave --compile out"),
        (
            v.gradient_release,
            "reduces gradients block by block, which gradient_release cannot see: leave one of them out",
        ),
        (v.activation_offload, "would move gathered weights to the host as well: leave --activation-offload out"),
    ]


def _captured(v: SimpleNamespace) -> list[tuple[object, str]]:
    """What does not go together with CUDA graphs: (whether it is so, the rest of the message)."""
    return [
        (v.device == "cpu", "needs a GPU: leave --cuda-graph out"),
        (v.gradient_release, "would keep the first learning rate inside the graph: leave it or --gradient-release out"),
        (
            v.activation_offload,
            "cannot copy to the host and back inside the graph: leave it or --activation-offload out",
        ),
        (v.precision == "fp16", "is not for a scaled loss, which precision = fp16 needs: use --precision bf16"),
        (v.compile, "is not tried with compiled code: leave it or --compile out"),
        (v.sharding == "on", "is for one process: leave it or --sharding out"),
    ]


def lora_goes_on(lora: bool, lora_init: str | None, reference_model: str, method: str) -> bool:
    """Whether the LoRA of --lora-init goes on as the run's adapter. Otherwise it is merged into the weights.

    With adapters the reference is the UNet without them: it has the LoRA only where that is part of the weights.
    """
    return lora and lora_init is not None and (reference_model == "base" or not METHODS[method].reference)


def without_effect(values: Mapping[str, Any], given: Collection[str], specs: Mapping[str, Spec]) -> list[str]:
    """Messages on the settings in `given` that mean nothing beside the others in `values`."""
    v = SimpleNamespace(**values)
    unread = own_settings() - METHODS[v.method].settings - REFUSED
    rules: list[tuple[object, Collection[str], str]] = [  # (whether it holds, settings then without effect, why)
        (not v.lora, ADAPTER, "without --lora"),
        (unread, unread, f"with method {v.method}"),
        (
            lora_goes_on(v.lora, v.lora_init, v.reference_model, v.method),
            ("rank", "alpha", "target_modules"),
            "because the adapter of --lora-init goes on",
        ),
        (v.optimizer == "adafactor", ADAM, "with --optimizer adafactor"),
        (v.optimizer == "lion8bit", ("eps",), "with --optimizer lion8bit"),
        (not v.warmup, ("warmup_start",), "without --warmup"),
        (not v.caption_dropout, ("dropped_caption",), "without --caption-dropout"),
        (not v.push_to_hub, ("hub_id", "hub_public"), "without --push-to-hub"),
        (not v.samples, DRAWN, "with --no-samples"),
        (not v.keep_best, ("patience",), "without --keep-best"),
        (v.timestep_draw != "logit-normal", ("logit_mean", "logit_std"), "without --timestep-draw logit-normal"),
    ]
    return [
        f"{spec.flag} has no effect {why}"
        for holds, names, why in rules
        if holds
        for name, spec in specs.items()
        if name in names and name in given
    ]


def resume_changes(
    old: Mapping[str, Any], new: Mapping[str, Any], specs: Mapping[str, Spec]
) -> tuple[list[str], list[str]]:
    """Settings that differ between a checkpoint and the run that resumes it: (allowed with a log line, refused).

    `old` and `new` are resolved settings. Changes that cannot alter the result are in neither list.
    """
    found: dict[str, list[str]] = {"free": [], "said": [], "refused": []}
    for name, spec in specs.items():
        if old[name] != new[name]:
            rule = _on_resume(spec, SimpleNamespace(**old), SimpleNamespace(**new))
            found[rule].append(f"{name} {brief(old[name])} -> {brief(new[name])}")
    return found["said"], found["refused"]


def _on_resume(spec: Spec, old: SimpleNamespace, new: SimpleNamespace) -> str:
    """A setting's rule for changes on resume: the declared one, except for the few whose rule depends on values."""
    if spec.name == "precision":
        return "said" if {old.precision, new.precision} <= AUTOCAST else "refused"
    if spec.name == "accumulation" and old.effective_batch == new.effective_batch:
        return "free"  # more or fewer processes, or another micro-batch: the update is the same
    if spec.name == "ema":
        return "said" if old.ema and new.ema else "refused"
    if spec.name in ("steps", "epochs") and new.scheduler != "constant":
        return "said"  # linear and cosine schedules end with the run: its length changes their learning rates
    if spec.name in ADAPTER and not (old.lora or new.lora):
        return "free"
    return spec.meta["resume"]
