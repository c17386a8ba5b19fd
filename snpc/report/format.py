"""Numbers and methods as text, the same on the terminal and in the report."""

from __future__ import annotations

from snpc.pipeline import PrunedModel


def format_count(number: float) -> str:
    """Three significant digits with a prefix: 5.03 M."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:#.3g}".rstrip(".") + f" {unit}"
    return f"{number:.0f}"


def format_share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.1f} %" if whole else "-"


def format_percent(ratio: float) -> str:
    """Three significant digits; a tiny ratio is "under 0.0001 %"."""
    return f"{100 * ratio:.3g} %" if ratio == 0 or ratio >= 1e-6 else "under 0.0001 %"


def describe_method(result: PrunedModel) -> str:
    """How units were chosen and weights were made, in a few words."""
    if not result.plan.keep:
        analysis = result.plan.analysis
        refitted = result.plan.method == "auto" and (analysis.reduction is not None or analysis.removal is not None)
        return "no widths cut" + ("; weights refitted to make up for what went" if refitted else "")
    if not result.closed_forms:
        return f"selected by {result.plan.criterion}"
    forms = list(result.closed_forms.values())
    coupled, norms = forms.count("score_selection"), forms.count("score_refit")
    rotated = len(forms) - coupled - norms - forms.count("refit")
    selected = f", {coupled} selected by the loss of attention scores" if coupled else ""
    selected += f", {norms} selected so and norms on their heads refitted" if norms else ""
    return f"in closed form: {rotated} groups rotated, {forms.count('refit')} refitted{selected}"
