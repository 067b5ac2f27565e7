"""Every setting of a run, once: command line, TOML files and the settings in a checkpoint come from these dataclasses.

A field is declared by `option(default, help, ...)`; names are unique across the groups, so that flags and TOML keys
need no prefix. `None` means "decide for me" (see `dpo.settings.resolve`). This module imports nothing heavy: `--help`
stays fast.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Any

from dpo.common.errors import UserError
from dpo.common.words import SHOWN, listed
from dpo.methods import METHODS, SHAPES, constants, readers
from dpo.settings.families import FAMILIES, LONGEST_CAPTION
from dpo.settings.fields import Spec, coerce, nearest, option, specs_of
from dpo.settings.rules import contradictions

SEEDS = 2**32  # the counter of keyed numbers has 32 bits for the seed (csrc_triton/philox.py)


@dataclass(frozen=True)
class Model:
    """What to align"""

    model: str | None = option(
        None,
        "what to align: a diffusers folder, hub id or single .safetensors file; none: the small world inside the package",
        aliases=("pretrained_model_name_or_path",),
        resume="said",  # not refused: the fingerprint of the weights is compared instead
    )
    revision: str | None = option(None, "revision of the model on the hub", resume="said")
    variant: str | None = option(
        None, "variant of the weight files, such as fp16; a part without it: its other files", resume="said"
    )
    vae: str | None = option(
        None, "another VAE: folder, hub id or .safetensors file", aliases=("pretrained_vae_model_name_or_path",)
    )
    unet_init: str | None = option(
        None, "start the policy from this UNet (folder, hub id or .safetensors file), as in SFT before DPO"
    )
    lora_init: str | None = option(
        None, "start the policy from this LoRA (.safetensors file, folder or hub id), as in SFT by adapters before DPO"
    )
    reference_model: str = option(
        "init", "what is compared with: the starting UNet, or the model's own", choices=("init", "base")
    )
    family: str = option("auto", "architecture; auto reads it from the model", choices=("auto", *FAMILIES))
    prediction_type: str = option(
        "auto",
        "what the denoiser predicts; auto: as the model says",
        choices=("auto", "epsilon", "v_prediction", "flow_prediction"),
    )
    timesteps: str = option(
        "auto", "timesteps trained on; auto: the four steps of a distilled model", choices=("auto", "all", "turbo")
    )
    zero_snr: str = option(
        "auto",
        "rescale the schedule to zero terminal SNR; auto: Turbo, or as the model says",
        choices=("auto", "on", "off"),
    )
    single_file_config: str | None = option(
        None, "diffusers folder or hub id that describes a single-file model; none: the hub's, by the file's layout"
    )
    text_tokens: int | None = option(
        None,
        "tokens of a caption in a flow-matching model; none: as its pipeline has it",
        unit="tokens",
        low=8,
        high=LONGEST_CAPTION,
    )
    train_guidance: float | None = option(
        None,
        "guidance scale that a model which takes it as an input (FLUX.1-dev) is told in training; none: 3.5",
        low=0.0,
    )
    cache_dir: str | None = option(None, "where hub downloads are kept", resume="free")


@dataclass(frozen=True)
class Data:
    """The preference pairs, and how they are read"""

    data: str | None = option(
        None,
        "pairs: hub id, folder, glob, parquet/tar/JSONL/CSV file or prepared store; none: the small world inside the package",
        aliases=("dataset_name", "train_data_dir"),
        resume="said",
    )
    data_format: str = option(
        "auto",
        "layout of the pairs; auto looks at it",
        choices=("auto", "pickapic", "chosen-rejected", "arrow", "webdataset", "jsonl", "csv", "folders", "store"),
        resume="said",
    )
    split: str = option("train", "split to train on", aliases=("dataset_split_name",))
    config_name: str | None = option(None, "configuration of a hub data set", aliases=("dataset_config_name",))
    validation_data: str | None = option(
        None, "held-out pairs; none: validation_fraction of the training pairs", resume="said"
    )
    validation_split: str = option("validation", "split of the held-out pairs", resume="said")
    validation_fraction: float | None = option(
        None,
        "share of the pairs held out (keyed; rough of few captions); none: a tenth, 50 pairs to a third, of at least 150 pairs",
        low=0.0,
        high=0.5,
    )
    validation_by: str = option(
        "auto",
        "what is held out together: all pairs of a caption, or each pair alone; auto: captions where they allow it",
        choices=("auto", "caption", "pair"),
    )
    validation_pairs: int = option(256, "held-out pairs used for the accuracy", unit="pairs", low=1, resume="said")
    validation_draws: int = option(8, "noise and timestep draws per held-out pair", unit="draws", low=1, resume="said")
    ties: str = option("drop", "tied pairs: leave out, or keep as p = 0.5", choices=("drop", "keep"))
    label_smoothing: float = option(
        0.0, "share of labels assumed wrong (p = 1 - this)", low=0.0, high=0.5, resume="said"
    )
    caption_column: str | None = option(None, "column of the captions; none: found by its usual names")
    chosen_column: str | None = option(
        None, "column of the preferred image (in tar shards: KEY.THIS.jpg); none: found by its usual names"
    )
    rejected_column: str | None = option(
        None, "column of the other image (in tar shards: KEY.THIS.jpg); none: found by its usual names"
    )
    single_image_column: str | None = option(
        None, "column of the images of a set without pairs, one a row with a label; none: found by its usual names"
    )
    liked_column: str | None = option(
        None, "column that says whether such an image is liked; none: found by its usual names"
    )
    resolution: int | None = option(None, "side of the square images; none: the model's own", unit="pixels", low=8)
    crop: str = option("center", "where to cut a square from each image", choices=("center", "random"))
    flip: bool = option(False, "mirror half of the pairs (both images alike)")
    caption_dropout: float = option(
        0.0,
        "share of captions replaced by the empty one",
        low=0.0,
        high=1.0,
        aliases=("proportion_empty_prompts",),
        resume="said",
    )
    dropped_caption: str = option(
        "auto",
        "a dropped caption: encoding of the empty one, or zeros; auto: as diffusers samples without a negative prompt",
        choices=("auto", "empty", "zeros"),
        resume="said",
    )
    max_pairs: int | None = option(
        None, "use only this many pairs", unit="pairs", low=1, aliases=("max_train_samples",)
    )
    streaming: bool = option(False, "read a hub data set as a stream instead of downloading it first")
    workers: int = option(
        -1,
        "processes that decode images; -1: half of the cores, at most 8",
        low=-1,
        high=256,
        aliases=("dataloader_num_workers",),
        resume="free",
    )
    prefetch: int = option(4, "batches decoded ahead per worker", unit="batches", low=1, resume="free")
    on_bad_image: str = option(
        "skip", "unreadable image: count and leave a hole, or stop", choices=("skip", "stop"), resume="said"
    )
    bad_image_limit: float = option(
        0.01,
        "stop when more than this share of pairs has an unreadable image; a few never stop a run, unless it is 0",
        low=0.0,
        high=1.0,
        resume="free",
    )
    max_image_mib: int = option(
        256, "an image file larger than this is left out, as an unreadable one is", unit="MiB", low=1, resume="said"
    )
    buckets: bool = option(
        False, "cut each pair to one of a few shapes of the square's area, the nearest to its own (docs/data.md)"
    )


@dataclass(frozen=True)
class Method:
    """The objective (method)"""

    method: str = option(
        "dpo",
        "how credit is spread over the timesteps (docs/method.md)",
        choices=tuple(METHODS),
    )
    beta: float | None = option(
        None, "strength of the pull to the reference; none: by method and family", above=0.0, resume="said"
    )
    target_gradient_factor: float | None = option(
        None,
        "let beta follow this mean of |dloss/dlogit|, such as 0.2, slowly, within a quarter and four times its start",
        above=0.0,
        high=0.45,
        resume="said",
    )
    loss: str = option(
        "sigmoid", "shape of the pairwise loss", choices=tuple(SHAPES), aliases=("loss_type",), resume="said"
    )
    loss_alpha: float | None = option(
        None,
        f"constant of the shape (docs/method.md); none: the shape's own ({constants()})",
        resume="said",
    )
    safeguard: float | None = option(
        None,
        f"margin of the bound on the losers' gradients ({readers('safeguard')}); none: 0.9, SDXL 0.6",
        low=0.0,
        high=1.0,
        resume="said",
    )
    kto_center: str = option(
        "update",
        f"what an image's gain is compared with: mean of the update before, or of the micro-batch ({readers('kto_center')})",
        choices=("update", "batch"),
        resume="said",
    )
    kto_liked_weight: float = option(
        1.0, f"weight of the images that are liked ({readers('kto_liked_weight')})", low=0.0, resume="said"
    )
    kto_disliked_weight: float = option(
        1.0, f"weight of those that are not ({readers('kto_disliked_weight')})", low=0.0, resume="said"
    )
    mapo_weight: float = option(
        0.1, f"weight of the preference beside the win image's error ({readers('mapo_weight')})", low=0.0, resume="said"
    )
    mapo_scale: float = option(
        0.5, f"how sharply errors become odds ({readers('mapo_scale')})", above=0.0, resume="said"
    )
    gamma: float = option(
        0.99475, f"discount per timestep away from noise ({readers('gamma')})", above=0.0, high=1.0, resume="said"
    )
    sft_weight: float = option(
        0.0, "weight of the preferred image's own denoising error in the loss", low=0.0, resume="said"
    )
    norm_penalty: float = option(
        0.0,
        "weight of what each prediction is larger than the reference's (root mean square), added to the loss; 0: none",
        low=0.0,
        resume="said",
    )
    window_low: int = option(0, "first timestep trained on", unit="timestep", low=0, high=999)
    window_high: int | None = option(
        None, "timestep after the last; none: the end of the schedule", unit="timestep", low=1, high=1000
    )
    timestep_draw: str = option(
        "grid",
        "how a flow's noise level s is drawn: every timestep of its grid alike, s uniform, or logit(s) normal",
        choices=("grid", "uniform", "logit-normal"),
    )
    logit_mean: float = option(0.0, "mean of logit(s) (timestep-draw logit-normal)", low=-10.0, high=10.0)
    logit_std: float = option(1.0, "standard deviation of logit(s) (timestep-draw logit-normal)", above=0.0, high=10.0)
    weight_cap: float = option(
        250.0, f"upper bound of the single-shot weight ({readers('weight_cap')})", above=0.0, resume="said"
    )
    rho: float = option(0.95, f"memory of the stepwise table ({readers('rho')})", low=0.0, high=1.0, resume="said")
    kappa: float = option(1.0, f"factor of the stepwise correction ({readers('kappa')})", low=0.0, resume="said")
    sigma2: str = option(
        "beta", f"variance in the stepwise correction ({readers('sigma2')})", choices=("beta", "posterior")
    )


@dataclass(frozen=True)
class Lora:
    """LoRA: adapters instead of the whole UNet"""

    lora: bool = option(False, "train low-rank adapters and leave the UNet as it is")
    rank: int = option(8, "rank of the adapters", low=1)
    alpha: float | None = option(None, "scale of the adapters (times 1/rank); none: equal to the rank", above=0.0)
    target_modules: tuple[str, ...] | None = option(
        None, "layers that get an adapter; none: those of attention, and of flow-matching models their MLPs too"
    )
    lora_dropout: float = option(0.0, "dropout inside the adapters", low=0.0, high=0.9, resume="said")
    lora_format: str = option(
        "diffusers", "key names in the saved adapter", choices=("diffusers", "kohya"), resume="free"
    )


@dataclass(frozen=True)
class Optim:
    """The updates: batch, learning rate, optimizer"""

    optimizer: str = option(
        "auto",
        "auto: adamw8bit (8-bit states) on a GPU, adamw elsewhere; bnb-adamw8bit, paged, lion8bit: bitsandbytes",
        choices=("auto", "adamw8bit", "bnb-adamw8bit", "paged-adamw8bit", "lion8bit", "adamw", "adafactor"),
    )
    learning_rate: float = option(
        1e-5, "peak learning rate (not multiplied by the batch)", above=0.0, aliases=("lr",), resume="said"
    )
    scale_lr: bool = option(
        False, "multiply the learning rate by the effective batch, as the published launchers do", resume="said"
    )
    batch_size: int = option(
        4, "pairs in one pass (micro-batch)", unit="pairs", low=1, aliases=("train_batch_size",), resume="said"
    )
    accumulation: int = option(
        1,
        "passes of each process summed into one update",
        unit="passes",
        low=1,
        aliases=("gradient_accumulation_steps",),
        resume="said",
    )
    steps: int | None = option(
        None, "updates; none: from epochs, or 2000", unit="updates", low=1, aliases=("max_train_steps",), resume="free"
    )
    epochs: float | None = option(
        None,
        "passes over the training pairs, in the place of steps; 0.5 is half of one",
        unit="epochs",
        above=0.0,
        aliases=("num_train_epochs",),
        resume="free",
    )
    scheduler: str = option(
        "constant",
        "learning rate after the warm-up",
        choices=("constant", "linear", "cosine"),
        aliases=("lr_scheduler",),
        resume="said",
    )
    warmup: int = option(
        0, "updates of linear warm-up", unit="updates", low=0, aliases=("lr_warmup_steps",), resume="said"
    )
    warmup_start: str = option(
        "step",
        "learning rate of the first update of a warm-up: one step of it, or zero as in diffusers' schedules",
        choices=("step", "zero"),
        resume="said",
    )
    adam_beta1: float = option(0.9, "decay of the gradient's mean", low=0.0, high=0.99999, resume="said")
    adam_beta2: float | None = option(
        None,
        "decay of the squared gradient's mean; none: 0.999, or Lion's 0.99 with lion8bit",
        low=0.0,
        high=0.99999,
        resume="said",
    )
    eps: float = option(1e-8, "Adam's denominator offset", above=0.0, aliases=("adam_epsilon",), resume="said")
    weight_decay: float = option(1e-2, "decoupled weight decay", low=0.0, aliases=("adam_weight_decay",), resume="said")
    max_grad_norm: float = option(1.0, "clip the gradient's norm to this; 0: no clipping", low=0.0, resume="said")
    ema: float = option(
        0.0,
        "decay of averaged weights, which are then the result; it warms up; 0: none",
        low=0.0,
        high=0.999999,
        resume="said",
    )
    gradient_release: bool = option(
        False,
        "update each weight inside the backward pass and free its gradient at once: less memory, one pass an update",
        resume="said",
    )

    effective_batch: int | None = option(
        None,
        "pairs of an update over all processes, from which accumulation follows; none: those that the other two give",
        unit="pairs",
        low=1,
        resume="said",
    )

    @property
    def betas(self) -> tuple[float, float]:
        """The optimizer's two decays."""
        assert self.adam_beta2 is not None, "decided when the model was loaded"
        return self.adam_beta1, self.adam_beta2

    @property
    def pairs(self) -> int:
        """Pairs per update over all processes; before that is decided (`resolve`), of a single process."""
        return self.effective_batch or self.batch_size * self.accumulation


@dataclass(frozen=True)
class Runtime:
    """Speed, memory and precision"""

    seed: int = option(0, "seed of everything random in the run", low=0, high=SEEDS - 1)
    device: str = option("auto", "auto: the GPU when there is one; else cuda, cuda:N or cpu", resume="said")
    precision: str = option(
        "auto",
        "bf16, fp16: autocast over fp32 weights; bf16-pure: bf16 weights, stochastic rounding; fp64: for tests",
        choices=("auto", "fp32", "bf16", "fp16", "bf16-pure", "fp64"),
        aliases=("mixed_precision",),
    )
    vae_precision: str = option(
        "auto",
        "precision of the VAE; auto: as the text encoders, but fp32 where it would overflow in fp16 (SDXL)",
        choices=("auto", "fp32", "bf16", "fp16"),
        resume="said",
    )
    tf32: bool = option(False, "TF32 in fp32 matrix products", aliases=("allow_tf32",), resume="said")
    deterministic: bool = option(
        False, "one order of sums on a GPU too, so that a resumed run has the same bits (slower)", resume="said"
    )
    checkpointing: str = option(
        "off",
        "recompute activations to save memory: off, on, auto (what fits the GPU) or blocks such as down_blocks.0,up_blocks.3",
        resume="free",
    )
    channels_last: str = option(
        "auto", "memory layout of convolutions; auto: on a GPU", choices=("auto", "on", "off"), resume="free"
    )
    attention: str = option("sdpa", "attention implementation", choices=("sdpa", "xformers"), resume="said")
    compile: bool = option(False, "torch.compile the UNet's repeated blocks (slow start, faster steps)", resume="said")
    kernels: str = option(
        "auto", "own Triton kernels, or plain torch", choices=("auto", "triton", "torch"), resume="said"
    )
    reference: str = option(
        "auto",
        "reference errors from a frozen copy, the UNet without adapters, or recorded beforehand",
        choices=("auto", "copy", "adapter", "recorded"),
        resume="said",
    )
    offload: str = option(
        "auto",
        "keep text encoders and VAE off the GPU while they are idle",
        choices=("auto", "on", "off"),
        resume="free",
    )
    vae_batch: int = option(
        8, "images per VAE call", unit="images", low=1, aliases=("vae_encode_batch_size",), resume="free"
    )
    threads: int | None = option(None, "CPU threads of torch; none: torch's choice", low=1, resume="free")
    activation_offload: bool = option(
        False, "keep what the backward pass needs in host memory: less GPU memory, the same result", resume="free"
    )
    sharding: str = option(
        "off",
        "on: each process holds a part of the weights, gradients and optimizer states (FSDP2), for what does not fit a GPU",
        choices=("off", "on"),
        resume="said",
    )
    keep_encoded: str = option(
        "auto",
        "keep encoded pairs in memory, so that later epochs read no images; auto: where they fit and crops are centred",
        choices=("auto", "on", "off"),
        resume="free",
    )
    cuda_graph: bool = option(
        False, "launch forward and backward of a micro-batch as one CUDA graph (GPU, one process)", resume="said"
    )


@dataclass(frozen=True)
class Output:
    """Results, checkpoints, logs and samples"""

    output: str = option("runs/dpo", "folder of the results", aliases=("output_dir",), resume="free")
    overwrite: bool = option(
        False, "replace another run in that folder, or what lies there under the names of a run's files", resume="free"
    )
    resume: str | None = option(
        None,
        "continue from latest (afresh when there is none), or from a checkpoint's path",
        aliases=("resume_from_checkpoint",),
        resume="free",
    )
    checkpoint_every: int = option(
        500,
        "updates between checkpoints; 0: only at the end",
        unit="updates",
        low=0,
        aliases=("checkpointing_steps",),
        resume="free",
    )
    checkpoints_limit: int = option(
        2, "checkpoints kept; 0: all", unit="checkpoints", low=0, aliases=("checkpoints_total_limit",), resume="free"
    )
    log_every: int = option(1, "updates between lines of metrics.jsonl", unit="updates", low=1, resume="free")
    validate_every: int | None = option(
        None,
        "updates between held-out accuracies; none: 100, more to keep to 5 % of the FLOPs, with keep_best ~10 at any cost; 0: never",
        unit="updates",
        low=0,
        aliases=("validation_steps",),
        resume="free",
    )
    samples: bool = option(True, "draw sample images before, during and after the training", resume="free")
    sample_every: int = option(
        0, "updates between sample grids; 0: only at the end", unit="updates", low=0, resume="free"
    )
    sample_prompts: tuple[str, ...] = option(
        (), "prompts of the sample grid, or one .txt file", separator="", resume="free"
    )
    sample_seeds: tuple[int, ...] = option(
        (0, 1), "seeds of the sample grid", low=-(2**63), high=2**64 - 1, resume="free"
    )
    sample_steps: int | None = option(
        None, "sampling steps; none: 50, or 4 for Turbo", unit="steps", low=1, resume="free"
    )
    sample_guidance: float | None = option(
        None,
        "guidance scale; none: 7.5 (SD), 5 (SDXL), 7 (SD 3), 3.5 (FLUX.1), 4 (FLUX.2, Qwen-Image), 0 (few steps)",
        low=0.0,
        resume="free",
    )
    sample_batch: int | None = option(
        None,
        "sample images drawn at a time; none: 4, or 1 where the GPU is short of memory",
        unit="images",
        low=1,
        resume="free",
    )
    tensorboard: bool = option(False, "write TensorBoard events too", resume="free")
    wandb: bool = option(False, "log to Weights & Biases too", resume="free")
    project: str = option(
        "diffusion-dpo", "project name for W&B", aliases=("tracker_project_name", "tracker_name"), resume="free"
    )
    push_to_hub: bool = option(False, "upload what the run wrote, without checkpoints, to the hub", resume="free")
    hub_id: str | None = option(
        None, "repository to upload to; none: the output folder's name", aliases=("hub_model_id",), resume="free"
    )
    hub_public: bool = option(
        False, "let everybody see the repository, where the upload makes it; otherwise it is private", resume="free"
    )
    judge: bool = option(
        True,
        "after a run of the small world inside the package: draw its report prompts before and after, and judge",
        resume="free",
    )
    evaluate: tuple[str, ...] = option(
        (),
        "scorers that compare the result with its start when the run ends (python -m dpo.evaluate --scorers help)",
        separator=" ",
        resume="free",
    )
    evaluate_prompts: tuple[str, ...] = option(
        (),
        "prompts of that comparison: texts, a file, or a named set; none: captions of the held-out pairs",
        separator="",
        resume="free",
    )
    model_card: bool = option(True, "write README.md with method, data, settings and figures", resume="free")
    keep_best: bool = option(
        False,
        "the weights of the best held-out accuracy are the result: half of the held-out pairs choose, the others are reported",
        resume="said",
    )
    patience: int | None = option(
        None,
        "with keep_best: held-out accuracies without gain that end the run; none: it makes all its updates",
        unit="accuracies",
        low=1,
        resume="said",
    )
    run_name: str | None = option(
        None,
        "name of the run at W&B and on its pages; its folder is runs/NAME where --output is not given",
        resume="free",
    )


@dataclass(frozen=True)
class Config:
    """A run."""

    model: Model = Model()
    data: Data = Data()
    method: Method = Method()
    lora: Lora = Lora()
    optim: Optim = Optim()
    runtime: Runtime = Runtime()
    output: Output = Output()


def groups() -> dict[str, type]:
    """The dataclass of each group, by the group's name."""
    return {item.name: type(item.default) for item in fields(Config)}


@cache
def specs() -> dict[str, Spec]:
    """Every setting, by name, in the order of the groups."""
    return {spec.name: spec for group, cls in groups().items() for spec in specs_of(group, cls)}


def flatten(config: Config) -> dict[str, Any]:
    """Every setting's value, by name."""
    return {name: getattr(getattr(config, spec.group), name) for name, spec in specs().items()}


def from_mapping(mapping: Mapping[str, Any], base: Config | None = None) -> Config:
    """A checked Config from flat or grouped settings; those left out keep `base`'s value (or the default).

    Raises UserError for an unknown name, a bad value or a bad combination.
    """
    values = flatten(base or Config()) | {
        name: coerce(specs()[name], value) for name, value in flat_settings(mapping).items()
    }
    config = Config(**{group: cls(**_of_group(group, values)) for group, cls in groups().items()})
    validate(config)
    return config


def of_before(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flat settings of a run of this or an earlier version, as they are allowed now.

    Seeds were once allowed to 2^63; every number that a run drew was that of the remainder. A dropped caption was the
    encoding of the empty one whatever the model. A run was always of one process.
    """
    passes = (
        coerce(spec := specs()[name], settings.get(name, spec.default)) for name in ("batch_size", "accumulation")
    )
    known = {"dropped_caption": "empty", "effective_batch": math.prod(passes)}
    return known | dict(settings) | {"seed": settings.get("seed", 0) % SEEDS}


def change(config: Config, **values: Any) -> Config:
    """`config` with some settings changed, by their flat names. Raises UserError as `from_mapping` does."""
    return from_mapping(values, config)


def to_toml(config: Config, comments: bool = True) -> str:
    """`config` as TOML that `from_mapping` reads back; a setting that is None is written as a comment."""
    return "\n".join(_group_toml(group, config, comments) for group in groups())


def _of_group(group: str, values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if specs()[name].group == group}


def flat_settings(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Flat or grouped settings as flat ones.

    Raises UserError for a name that is unknown, set twice or in another group.
    """
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        inner = value if isinstance(value, Mapping) and key in groups() else {key: value}
        for name, setting in inner.items():
            if name not in specs():
                raise UserError(unknown_setting(name))
            if name in flat:
                raise UserError(f"{name} is set twice: keep one")
            if inner is value and specs()[name].group != key:
                raise UserError(f"[{key}] {name}: {name} belongs to [{specs()[name].group}]")
            flat[name] = setting
    return flat


def unknown_setting(name: str) -> str:
    """The message on a setting that does not exist: its name here, or the nearest valid name."""
    for spec in specs().values():
        if name in spec.meta["aliases"]:
            return f"unknown setting {name}: it is called {spec.name} here"
    like, name = nearest(name[:SHOWN], specs()), listed([name])
    return f"unknown setting {name}: " + (
        f"did you mean {like}?" if like else "python -m dpo.train --help lists them all"
    )


def _group_toml(group: str, config: Config, comments: bool) -> str:
    import tomli_w

    lines = [f"[{group}]" + (f"  # {groups()[group].__doc__}" if comments else "")]
    for name, value in _of_group(group, flatten(config)).items():
        comment = f"  # {describe(specs()[name])}" if comments else ""
        if value is not None:
            lines.append(tomli_w.dumps({name: value}).rstrip() + comment)
        elif comments:
            lines.append(f"# {name} ={comment}")
    return "\n".join(lines) + "\n"


def describe(spec: Spec) -> str:
    """The one-line doc with the unit and the allowed words."""
    extras = [spec.meta["unit"], "|".join(spec.meta["choices"])]
    return "; ".join(filter(None, [spec.meta["help"], *extras]))


def validate(config: Config) -> None:
    """UserError on the first bad value or combination; what needs the model or the device is checked by `resolve`."""
    values = flatten(config)
    for name, value in values.items():
        if coerce(specs()[name], value) != value:
            raise UserError(f"{name} = {value!r}: expected a {specs()[name].kind.__name__}")
    if found := contradictions(values):
        raise UserError(found[0])
