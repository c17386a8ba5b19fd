"""Numbers and results in the words that the terminal and the report share."""

from __future__ import annotations

from snpc.pipeline.prune import PrunedModel


def format_count(number: float) -> str:
    """Three digits: 5.03 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:.0f}"


def format_share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def format_percent(ratio: float) -> str:
    """Three digits, and no more zeros than a reader can take in."""
    return f"{100 * ratio:.3g} %" if ratio == 0 or ratio >= 1e-6 else "under 0.0001 %"


def describe_method(result: PrunedModel) -> str:
    """How units were chosen and weights made, in words."""
    if not result.plan.keep:
        return "no widths cut"
    if not result.closed_forms:
        return f"selected by {result.plan.criterion}"
    forms = list(result.closed_forms.values())
    coupled = forms.count("score_selection")
    rotated = len(forms) - coupled - forms.count("refit")
    selected = f", {coupled} selected by what the scores lose" if coupled else ""
    return f"in closed form: {rotated} groups rotated, {forms.count('refit')} refitted{selected}"
