"""What a run's figures mean, in plain words: did it work, and what should make one wary?"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from dpo.common.stats import share_interval
from dpo.pages import kept, single
from dpo.pages.folder import LATE, SHARED, RunFolder
from dpo.settings.advice import HIGHEST_RATE, LOWEST_RATE

USUAL_RATE = {"full": "1e-6 to 5e-5", "lora": "1e-5 to 1e-3"}

FEW_UPDATES = 20
FEW_PAIRS = 300
FEW_HELD_OUT = 100
ENOUGH_TO_SHARE = 150  # pairs, of which some are held out unasked: dpo.data.held_out.ENOUGH
FAITHFULNESS_LOSS = 0.04
SATURATED = 0.1
RISING = 0.02
OVERFIT = 0.15
LARGER = 1.05  # predictions of the policy over the reference's


class Caution(NamedTuple):
    """A reason to be wary: what was seen, what it means and what to do."""

    title: str
    text: str
    grave: bool = False


class Verdict(NamedTuple):
    """The judgement on a run. level: "good", "mixed", "poor" or "early" (too little to tell)."""

    level: str
    headline: str
    sentences: list[str]


class Evidence(NamedTuple):
    """A share with its 95 % interval that should lie above what guessing gives."""

    share: float
    low: float
    high: float
    cases: int
    guessing: float = 0.5

    @property
    def above(self) -> bool:
        return self.low > self.guessing

    @property
    def below(self) -> bool:
        return self.high < 0.5


def held_out(run: RunFolder) -> Evidence | None:
    """The held-out preference accuracy of the result."""
    found = kept.validation(run)
    if found is None:
        return None
    share, count = float(found["heldout_accuracy"]), int(found.get("heldout_pairs") or 0)
    low, high = found.get("heldout_interval") or share_interval(share * count, count)
    return Evidence(share, low, high, count, single.guessing(run))


def win_rate(run: RunFolder) -> Evidence | None:
    """The share of images after the training that the judge prefers to those from before it."""
    found = run.evaluation
    share = found.get("win_rate")
    if not isinstance(share, (int, float)):
        return None
    count = int(found.get("prompts") or 0)
    low, high = found.get("win_rate_interval") or share_interval(share * count, count)
    return Evidence(float(share), low, high, count)


def faithfulness_loss(run: RunFolder) -> float | None:
    """How far the share of images that show what the prompt says has fallen; negative for a gain."""
    before, after = (run.evaluation.get(f"faithfulness_{when}") for when in ("before", "after"))
    return before - after if isinstance(before, (int, float)) and isinstance(after, (int, float)) else None


def verdict(run: RunFolder) -> Verdict:
    """The paragraph at the top of the report."""
    sentences = [*_progress(run), *_findings(run)]
    learned, judged = held_out(run), win_rate(run)
    evidence = [found for found in (learned, judged) if found is not None]
    costs = [found for found in warnings(run) if found.grave]
    if run.status == "failed":
        reason = str(run.summary.get("reason", "")).rstrip(".")
        return Verdict("poor", "The run stopped with an error.", [reason and f"{reason}.", *sentences])
    if run.done < FEW_UPDATES:
        return Verdict("early", "Too early to tell.", [*sentences, f"A verdict needs at least {FEW_UPDATES} updates."])
    if any(found.below for found in evidence):
        return Verdict("poor", "It did not work: the model moved away from the preferred images.", sentences)
    if not evidence:
        return _verdict_without_evidence(run, sentences, costs)
    if not any(found.above for found in evidence):
        what = f"train on more {single.things(run)}" if _overfit(run) else "train longer"
        text = f"{single.nothing_shown(run)}: {what}, or measure on more {single.held_things(run)}."
        return Verdict("poor", "No effect can be shown.", [*sentences, text])
    if costs:
        return Verdict(
            "mixed",
            f"It learned the preference, but at a price: {costs[0].title[0].lower()}{costs[0].title[1:]}.",
            sentences,
        )
    if not all(found.above for found in evidence):
        return Verdict("mixed", "It learned something, but not every measurement shows it.", sentences)
    return Verdict("good", "It worked: the model learned the preference.", sentences)


def _verdict_without_evidence(run: RunFolder, sentences: list[str], costs: list[Caution]) -> Verdict:
    missing = _without_held_out(run)
    if not run.pairwise:
        return Verdict("early", "Trained; whether it is better was not measured.", [*sentences, missing])
    accuracy = run.late("implicit_accuracy")
    if costs:
        return Verdict("mixed", f"Be wary: {costs[0].title[0].lower()}{costs[0].title[1:]}.", [*sentences, missing])
    if accuracy is not None and accuracy > 0.55 and not single.is_single(run):
        return Verdict(
            "mixed",
            f"It fits the training {single.things(run)}; whether it learned the preference was not measured.",
            [*sentences, missing],
        )
    return Verdict("poor", f"It has learned little, even on the training {single.things(run)}.", [*sentences, missing])


def _without_held_out(run: RunFolder) -> str:
    """Why nothing is known beyond the training pairs, and what to do."""
    usable = run.summary.get("data", {}).get("usable")
    few = isinstance(usable, int) and usable < ENOUGH_TO_SHARE and run.setting("validation_fraction") == 0
    why = (
        f"None of the {usable:,} {single.things(run)} was held out: of fewer than {ENOUGH_TO_SHARE} that is done only when asked for. So"
        if few
        else f"No held-out {single.things(run)} were measured, so"
    )
    return (
        f"{why} nothing here shows that it holds beyond the training {single.things(run)}: give --validation-data, or "
        f"--validation-fraction 0.2 for a fifth of the {single.things(run)}."
    )


def _progress(run: RunFolder) -> list[str]:
    pairs = run.pairs_seen()
    seen = f" on {pairs:,} {single.things(run)}" if pairs else ""
    if run.done == 0:
        return ["No update was recorded."]
    if run.status == "finished":
        return [f"{f'All {run.done:,} updates were' if run.done > 1 else 'Its one update was'} made{seen}."]
    return [f"The run ended after {run.done:,} of {run.wanted:,} updates{seen}; `--resume latest` goes on from there."]


def _findings(run: RunFolder) -> list[str]:
    found = []
    learned, judged, accuracy = held_out(run), win_rate(run), run.late("implicit_accuracy")
    if learned is not None:
        found.append(
            f"On {learned.cases:,} {single.held_things(run)} that it never trained on{_shared(run)}, the model {single.held_side(run)} "
            f"{learned.share:.0%} ({learned.low:.0%} to {learned.high:.0%}){single.balanced(run)}; {single.told_guessing(run)}."
        )
        if (kept.validation(run) or {}).get("weights") == "averaged":
            found.append("That is of the averaged weights, which are saved; loss and margins are of those in training.")
        found += kept.sentences(run)
    elif accuracy is not None and run.pairwise:
        found.append(
            f"On the {single.things(run)} it was trained on, the model {single.side(run)} {accuracy:.0%}{single.by_chance(run)}."
        )
    if judged is not None:
        found.append(
            f"A judge prefers its images to those from before the training in {judged.share:.0%} of {judged.cases:,} cases "
            f"({judged.low:.0%} to {judged.high:.0%})."
        )
    lost = faithfulness_loss(run)
    if lost is not None:
        after = run.evaluation["faithfulness_after"]
        before = run.evaluation["faithfulness_before"]
        found.append(f"{after:.0%} of the images show what the prompt says, {before:.0%} before the training.")
    return found


def _shared(run: RunFolder) -> str:
    """A clause where held-out pairs may have more in common with the training pairs than whole captions would."""
    alone = run.setting("validation_fraction") and run.setting("validation_by") == "pair"
    if not alone and not run.summary.get("data", {}).get(SHARED):
        return ""
    return f" (captions or images of theirs may be in {single.things(run)} that it did train on)"


def warnings(run: RunFolder) -> list[Caution]:
    """All reasons to be wary, the grave ones first."""
    checks = (
        _collapsed, _faithfulness, _both_errors_rise, _saturated, _larger, _overfit, _rate, _still, _spikes, _few_pairs, _few_held_out,
        _ties, _holes,
    )  # fmt: skip
    found = [warning for check in checks if (warning := check(run)) is not None]
    said = [text for text in run.summary.get("warnings", []) if not text.startswith("learning rate")]  # judged by _rate
    if said:
        found.append(
            Caution(
                "Said at the start of the run", " ".join(f"{text[:1].upper()}{text[1:].rstrip('.')}." for text in said)
            )
        )
    return sorted(found, key=lambda warning: not warning.grave)


def _collapsed(run: RunFolder) -> Caution | None:
    bad = [update["step"] for update in run.updates if update.get("pairs") and update.get("loss") is None]
    if not bad:
        return None
    return Caution(
        f"The loss was not a number at update {bad[0]}",
        "The weights are spoiled from there on. Go back to an earlier checkpoint and lower the learning rate.",
        True,
    )


def _faithfulness(run: RunFolder) -> Caution | None:
    lost = faithfulness_loss(run)
    if lost is None or lost < FAITHFULNESS_LOSS:
        return None
    pulled = ", or raise beta, which pulls it back to where it started" if "beta" in run.row.settings else ""
    return Caution(
        f"Faithfulness fell from {run.evaluation['faithfulness_before']:.0%} to {run.evaluation['faithfulness_after']:.0%}",
        "More images no longer show what the prompt says: the model pleases the judge at the cost of its task. Train for fewer "
        f"updates or at a lower learning rate{pulled}.",
        True,
    )


def _both_errors_rise(run: RunFolder) -> Caution | None:
    win, lose, scale = (
        run.late(name) for name in ("win_error_vs_reference", "lose_error_vs_reference", "reference_win_error")
    )
    if win is None or lose is None or not scale or win <= RISING * scale or lose <= 0:
        return None
    last = "raise beta, or add --sft-weight" if "sft_weight" in run.row.settings else "or raise beta"
    return Caution(
        "Both errors rise",
        f"The model has become worse at both {'kinds of image' if single.is_single(run) else 'images of a pair'}, {win / scale:.1%} on "
        "the preferred one; the preference is met only because the other one suffers more. This is over-optimisation, and images "
        f"degrade next. Stop earlier, lower the learning rate, {last}.",
        win > 3 * RISING * scale,
    )


def _saturated(run: RunFolder) -> Caution | None:
    factor = run.late("gradient_factor")
    if factor is None or run.start is None or not run.start.pull or factor > SATURATED * run.start.pull:
        return None
    return Caution(
        "The loss is saturated",
        f"Nearly every {single.things(run)[:-1]} is already decided, so only {factor / run.start.pull:.1%} of the gradient at the start is left and "
        "further updates change little. Beta is large for this data, or the same pairs were seen too often.",
    )


def _larger(run: RunFolder) -> Caution | None:
    ratio = run.late("prediction_norm_ratio")
    if ratio is None or ratio < LARGER:
        return None
    return Caution(
        f"Predictions have grown by {ratio - 1:.0%}",
        "They are larger than the reference's, which is known to harden contrast and colours, and not a part of any preference. Look "
        "at the sample images; if they show it, stop earlier, lower the learning rate, raise beta, or give --norm-penalty.",
    )


def _late_pairs(run: RunFolder) -> int:
    """The training pairs that a late figure is a mean over."""
    late = run.updates[-max(1, round(len(run.updates) * LATE)) :]
    return int(sum(update.get("pairs") or 0 for update in late))


def _overfit(run: RunFolder) -> Caution | None:
    learned, accuracy = held_out(run), run.late("implicit_accuracy")
    if (
        learned is None
        or accuracy is None
        or not run.pairwise
        or single.is_single(run) != single.is_held_single(run)
        or run.done < FEW_UPDATES
        or _late_pairs(run) < FEW_HELD_OUT
        or accuracy - learned.share < OVERFIT
        or accuracy < learned.high
    ):
        return None
    return Caution(
        "It remembers rather than learns",
        f"On training {single.things(run)} it is right in {accuracy:.0%}, on others in {learned.share:.0%}. More of them or fewer updates help.",
    )


def _rate(run: RunFolder) -> Caution | None:
    rate, trained = run.learning_rate(), "lora" if run.lora else "full"
    if rate is None or LOWEST_RATE <= rate <= HIGHEST_RATE[trained]:
        return None
    usual = f"Usual for {'LoRA' if run.lora else 'full fine-tuning'}: {USUAL_RATE[trained]}."
    if rate < LOWEST_RATE:
        text = (
            "The papers print 2.048e-8, but the published code trains at 1e-8 times 2048 pairs = 2.048e-5, a thousand times "
            "more. At this rate nothing will change."
        )
        return Caution(f"The learning rate {rate:.3g} is far too small", f"{usual} {text}")
    return Caution(
        f"The learning rate {rate:.3g} is far too large",
        f"{usual} Images are likely to fall apart even where accuracy looks good.",
    )


def _still(run: RunFolder) -> Caution | None:
    _, margins = run.series("margin_p90")
    if (
        run.done < FEW_UPDATES
        or not run.pairwise
        or not len(margins)
        or np.abs(margins[-max(1, len(margins) // 5) :]).max() > 0.01
    ):
        return None
    return Caution(
        "The model has hardly moved",
        f"The policy still rates the {single.things(run)} as it did before the first update. The learning rate is too small, or the "
        "warm-up is not over.",
    )


def _spikes(run: RunFolder) -> Caution | None:
    steps, norms = run.series("grad_norm")
    if len(norms) < FEW_UPDATES:
        return None
    half = len(norms) // 2
    usual, worst = float(np.median(norms)), float(norms[half:].max())
    if not (math.isfinite(usual) and usual > 0 and worst > 20 * usual):
        return None
    at = int(steps[half:][norms[half:].argmax()])
    return Caution(
        f"The gradient jumped to {worst / usual:.0f} times its usual size at update {at:,}",
        "A jump late in a run often comes before images turn to noise. Look at the pictures; a lower learning rate helps.",
    )


def _few_pairs(run: RunFolder) -> Caution | None:
    usable = run.summary.get("data", {}).get("usable")
    if not isinstance(usable, int) or usable >= FEW_PAIRS:
        return None
    return Caution(
        f"Only {usable:,} training {single.things(run)}",
        f"So few {single.things(run)} are soon known by heart; what is learned may be their accidents. Some thousands are better.",
    )


def _few_held_out(run: RunFolder) -> Caution | None:
    learned = held_out(run)
    if learned is None or learned.cases >= FEW_HELD_OUT:
        return None
    return Caution(
        f"Only {learned.cases} held-out {single.held_things(run)}",
        f"The accuracy is known to plus or minus {50 * (learned.high - learned.low):.0f} percentage points only; "
        f"{_how_to_measure_more(run)}.",
    )


def _how_to_measure_more(run: RunFolder) -> str:
    """What to give for more of them: the cap matters only where it leaves pairs unmeasured."""
    there = run.summary.get("data", {}).get("held out")
    if isinstance(there, int) and there > run.setting("validation_pairs", there):
        return f"{there:,} are held out: measure more of them, by --validation-pairs"
    given = (
        "a larger --validation-data" if run.setting("validation_data") else "--validation-fraction or --validation-data"
    )
    return f"hold out more, by {given}"


def _holes(run: RunFolder) -> Caution | None:
    holes = run.total("unusable_pairs")
    if not holes:
        return None
    share = f"{holes:,} of {holes + run.total('pairs'):,}" if run.whole else "Some"
    return Caution(
        f"{share} {single.things(run)} were left out while training",
        "An image of theirs could not be read, or is the same on both sides: the log's warnings name it (those of a store "
        "were given when it was prepared).",
    )


def _ties(run: RunFolder) -> Caution | None:
    tied, seen = run.total("tied_pairs"), run.total("pairs")
    if not seen or tied / seen < 0.3:
        return None
    return Caution(
        f"{tied / seen:.0%} of the pairs were ties",
        "A tie teaches the model to stay where it is, and its accuracy is a coin's: read the training accuracy with "
        "that in mind.",
    )
