"""The two statements on a result, in words: whether the rewrite is correct, and how close its outputs are."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from snpc.passes.quantization import operator_counts
from snpc.types import (
    Dequantization,
    Difference,
    Grade,
    Perplexity,
    Quality,
    Requantization,
    Restriction,
    TaskChange,
    Verdict,
)

MEANINGS: dict[Grade, str] = {
    "good": "outputs are close to the original's",
    "fair": "outputs differ from the original's: measure the accuracy on your own task",
    "poor": "outputs no longer resemble the original's",
}
TASK_METRIC_TEXTS = {"top1": "top-1 accuracy", "top5": "top-5 accuracy", "f1": "F1", "spearman": "Spearman correlation"}
LARGE_ON_NOISE = 0.5  # relative change: so far, outputs differ on any inputs


def rewrite_text(verdict: Verdict) -> str:
    """Does the written file compute what the plan says?"""
    checks = "; ".join(verdict.structure)
    if verdict.not_run:
        return f"rewrite: structure checked, not run: {verdict.not_run} ({checks})"
    if not verdict.equals_mask:
        return f"rewrite: not compared with its plan, give --plan for that ({checks})"
    largest = max(d.relative for d in verdict.equals_mask)
    same = f"sliced equals masked to {largest:.1e} relative on {verdict.compared}"
    return f"rewrite: correct ({same}; {checks})"


def restriction_text(record: Restriction) -> str:
    """How a model says less than its source, and that what is left is equal."""
    worst = max((d.relative for d in record.differences), default=0.0)
    equal = f"equal to the original's to {worst:.1e}" if record.differences else record.compared
    return f"{record.describe()}; what is left: {equal}"


def dequantization_text(record: Dequantization) -> str:
    """What became float, what did not, and how much that changed the outputs."""
    text = f"dequantized {record.source.name}: {operator_counts(record.replaced)} became float"
    if record.left:
        text += f"; left quantized, as no rule fits: {operator_counts(record.left)}"
    if not record.differences:
        return f"{text}; outputs were not compared with the quantized model's ({record.compared})"
    largest = max(difference.relative for difference in record.differences)
    return f"{text}; outputs change by {largest:.2g} relative on {record.compared}"


def requantization_text(record: Requantization) -> str:
    """Which weights have the codes of the file, which were rounded anew, and what that changes by itself."""
    sliced = f"quantized as it was: {record.sliced} constants sliced bit for bit"
    if not record.requantized:
        return sliced
    text = f"{sliced}, {record.requantized} quantized anew"
    if not record.differences:
        return text
    return f"{text}, which changes the outputs by {record.relative:.2g} relative, apart from pruning"


def quality_text(quality: Quality) -> str:
    """The grade, and what it means."""
    if not quality.differences:
        return "quality: unknown: outputs were not compared"
    if quality.random_inputs:
        return "quality: unknown: drift on random inputs says nothing about accuracy; give --calib DATA"
    if quality.grade == "unknown":
        return "quality: not graded: the metric has no limits"
    return f"quality: {quality.grade}: {MEANINGS[quality.grade]}"


def quality_words(differences: Sequence[Difference], grade: Grade) -> str:
    """What the outputs are like, for a reader who knows no metric."""
    if not differences:
        return "Outputs were not compared."
    if grade == "unknown":
        return "How close its outputs are to the original's on real data is not known."
    same = next((d.agreement for d in differences if d.agreement is not None and d.metric == "kl"), None)
    share = f"; the top entry is the same in {100 * same:.1f} % of all cases" if same is not None else ""
    return f"Its {MEANINGS[grade]}{share}."


def score_words(found: TaskChange) -> str:
    """``Top-1 accuracy goes from 81.5 to 80.9 %``"""
    name = TASK_METRIC_TEXTS.get(found.metric, found.metric)
    return f"{name[:1].upper()}{name[1:]} goes from {100 * found.before:.4g} to {100 * found.after:.4g} %."


def quality_warning(quality: Quality) -> str:
    """What to do about outputs that are far off; "" where they are not."""
    if quality.random_inputs and max((d.drift for d in quality.differences), default=0.0) > LARGE_ON_NOISE:
        return (
            "even on random inputs outputs no longer resemble the original's, and accuracy is probably lost: give "
            "--calib DATA to fit weights to, prune less, or reduce tokens instead (--tokens)"
        )
    if quality.grade == "poor":
        return (
            "outputs no longer resemble the original's: prune less (a larger --target, a smaller --ratio), let tokens "
            "go first (--tokens auto), give more --calib-samples, or train it (snpc finetune)"
        )
    return ""


def output_lines(quality: Quality) -> Iterator[str]:
    """A line for each output that is judged, and one for all others."""
    for d in quality.differences:
        if d.metric != "none":
            yield f"{d.output}: {drift_text(d)}, on {quality.source}"
    if quality.perplexity is not None:
        yield perplexity_text(quality.perplexity)
    others = [d for d in quality.differences if d.metric == "none"]
    if others:
        largest = max(d.relative for d in others)
        names = others[0].output if len(others) == 1 else f"{len(others)} outputs, {others[0].output} and others"
        yield f"{names}: not judged; changed by at most {largest:.3g} relative"


def drift_text(d: Difference) -> str:
    """The change of one output, in a few words."""
    error = f" +- {2 * d.error:.2g}" if d.error else ""
    drift = "" if d.drift == d.distance else f", drift {d.drift:.3g} relative"  # the same where a metric was asked for
    if d.metric == "kl":
        guess = d.rows > 1 and d.perplexity is None
        factor = f" (perplexity x {math.exp(min(d.distance, 99.0)):.3g})" if guess else ""
        text = f"KL divergence {d.distance:.3g}{error} nats{factor}{drift}"
    elif d.metric == "cosine":
        text = f"1 - cosine {d.distance:.3g}{error}{drift}"
    elif d.metric == "relative":
        text = f"drift {d.drift:.3g}{error} relative, cosine {d.cosine:.4f}"
    elif d.metric == "none":
        return f"not judged, changed by {d.relative:.3g} relative"
    else:
        text = f"{d.metric} {d.distance:.3g}{error}"
    return text + agreement_text(d)


def task_text(found: TaskChange) -> str:
    """``top-1 accuracy: 81.5 -> 80.9 % (0.6 +- 1.1 points lost), of 400 samples of eval.npz``"""
    name = TASK_METRIC_TEXTS.get(found.metric, found.metric)
    error = f" +- {200 * found.error:.2g}" if found.error else ""
    lost = f"{abs(found.drop):.2g}{error} points {'lost' if found.drop > 0 else 'gained'}"
    change = f"{100 * found.before:.4g} -> {100 * found.after:.4g} %"
    return f"{name}: {change} ({lost}), of {found.samples} samples of {found.source}"


def perplexity_text(found: Perplexity) -> str:
    """``perplexity: 3.58 before, 4.15 after (x 1.16 +- 0.02), of 2032 tokens``"""
    error = f" +- {2 * found.error:.2g}" if found.error else ""
    change = f"{found.before:.4g} before, {found.after:.4g} after (x {found.factor:.3g}{error})"
    return f"perplexity: {change}, of {found.tokens} tokens"


def agreement_text(d: Difference) -> str:
    if d.agreement is None or d.metric != "kl":
        return ""
    between = ""
    if d.interval is not None:
        low, high = (100 * share for share in d.interval)
        between = f" ({low:.0f} to {high:.0f} %)"
    return f", same top entry in {100 * d.agreement:.1f} %{between}"
