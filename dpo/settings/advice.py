"""What the log says of the settings before a run: its headline, and what is allowed but probably not meant."""

from __future__ import annotations

from dpo.common.words import counted, number_of
from dpo.methods import METHODS
from dpo.settings.config import Config, change
from dpo.settings.fields import brief
from dpo.settings.resolve import large_weight, learning_rate, total_steps

LOWEST_RATE = 1e-7  # nothing published trains below this
HIGHEST_SINGLE_SHOT_BETA = 1000.0
FEWEST_PAIRS = 16  # in a full fine-tuning update
FLOW_BETA, FLOW_RATE = 500.0, 1e-4  # of a flow-matching model: below the one it should not reach the other
HIGHEST_RATE = {"full": 1e-4, "lora": 2e-3}
MANY_EPOCHS = 30  # of the published runs none comes to ten
USUAL_EPOCHS = 10


def headline(config: Config, processes: int = 1, things: str = "pairs") -> str:
    """The line that a run starts with: what is trained, effective batch, learning rate, beta.

    things: what it is trained on, pairs or images, here and below.
    """
    optim, method = config.optim, config.method
    what = f"LoRA of rank {config.lora.rank}" if config.lora.lora else "all weights"
    split = f"{optim.batch_size} x {optim.accumulation}" + (f" x {processes} processes" if processes > 1 else "")
    rate = f"learning rate {learning_rate(config):.4g}" + (
        f" ({optim.learning_rate:g} x batch)" if optim.scale_lr else ""
    )
    warm = (
        f", {optim.scheduler} after {number_of(optim.warmup, 'updates')} of warm-up"
        if optim.warmup
        else f", {optim.scheduler}"
    )
    beta = f", beta {brief(method.beta)}" if "beta" in METHODS[method.method].settings else ""
    return f"{method.method}, {what}: {number_of(optim.pairs, things)} an update ({split}), {rate}{warm}{beta}"


def length(config: Config, pairs: int, things: str = "pairs") -> list[str]:
    """A line for the log on the length of a run over `pairs` training pairs, where it was given in epochs."""
    if config.optim.epochs is None:
        return []
    epochs = f"{brief(config.optim.epochs)} {'epoch' if config.optim.epochs == 1 else 'epochs'}"
    return [f"{epochs} of {number_of(pairs, things, ',')} = {number_of(total_steps(config, pairs), 'updates', ',')}"]


def too_long(config: Config, pairs: int, things: str = "pairs") -> list[str]:
    """Messages on a length that does not suit the `pairs` that are trained on, which the settings alone do not tell."""
    found, optim, steps = [], config.optim, total_steps(config, pairs)
    epochs = steps * optim.pairs / pairs
    if optim.epochs is None and epochs > MANY_EPOCHS:
        fewer = total_steps(change(config, steps=None, epochs=USUAL_EPOCHS), pairs)
        found.append(
            f"{counted(steps, 'update', 'updates')} of {number_of(optim.pairs, things)} are {epochs:.0f} epochs of "
            f"{f'these {pairs:,} {things}' if pairs > 1 else f'one {things[:-1]}'}, which may be learned by heart: --epochs "
            f"{USUAL_EPOCHS} makes {number_of(fewer, 'updates')}"
        )
    if optim.epochs is not None and optim.warmup >= steps:
        found.append(_long_warmup(optim.warmup, steps))
    return found


def _long_warmup(warmup: int, steps: int) -> str:
    return f"the warm-up of {number_of(warmup, 'updates')} does not end within {steps}: the rate stays below its peak"


def warnings(config: Config, things: str = "pairs") -> list[str]:
    """Messages on settings that are allowed but probably not meant."""
    found = []
    rate, batch = learning_rate(config), config.optim.pairs
    release = config.optim.gradient_release
    highest = HIGHEST_RATE["lora" if config.lora.lora else "full"]
    if rate < LOWEST_RATE:
        scaled = (
            "it is multiplied by the batch, but the published one has 2048 pairs"
            if config.optim.scale_lr
            else "no --scale-lr"
        )
        found.append(
            f"learning rate {rate:g} hardly trains ({scaled}): the paper prints 2.048e-8, a thousandth of the 2.048e-5 of the "
            "published code (1e-8 x 2048 pairs)"
        )
    elif rate > highest:
        what = "LoRA" if config.lora.lora else "full fine-tuning"
        found.append(
            f"learning rate {rate:g} is high for {what} (published: 1e-5 to 2e-5); expect images to turn to noise"
        )
    if (
        large_weight(config.method.method, config.model.prediction_type)
        and (config.method.beta or 0) > HIGHEST_SINGLE_SHOT_BETA
    ):
        found.append(
            f"beta {config.method.beta:g} is high for {config.method.method}, whose weight averages about 20: "
            "the default is a tenth of dpo's"
        )
    beta = config.method.beta if "beta" in METHODS[config.method.method].settings else None
    if (
        config.model.prediction_type == "flow_prediction"
        and beta is not None
        and beta < FLOW_BETA
        and rate >= FLOW_RATE
    ):
        found.append(
            f"beta {beta:g} with learning rate {rate:g} is little to hold a flow-matching model near its reference, and public "
            f"trainers report that it collapses: --beta {FLOW_BETA:g} or more (2000 by default), or a rate below {FLOW_RATE:g}"
        )
    if config.model.model and not config.lora.lora and batch < FEWEST_PAIRS:
        more = "with --gradient-release only a larger --batch-size has more" if release else "raise --accumulation"
        found.append(
            f"{number_of(batch, things)} an update is few for full fine-tuning (published: 2048 pairs); {more}"
        )
    if config.runtime.vae_precision == "fp16" and config.model.family == "sdxl" and not config.model.vae:
        found.append(
            "SDXL's own VAE overflows in fp16: give --vae madebyollin/sdxl-vae-fp16-fix, or leave --vae-precision at auto"
        )
    if config.optim.steps is not None and config.optim.warmup >= config.optim.steps:
        found.append(_long_warmup(config.optim.warmup, config.optim.steps))
    if (
        config.model.model
        and not config.data.validation_data
        and config.data.validation_fraction == 0
        and config.output.validate_every != 0
    ):
        found.append(
            f"no held-out {things}, so no held-out accuracy: give --validation-data or --validation-fraction 0.1"
        )
    return found
