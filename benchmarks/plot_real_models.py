"""The picture and the tables of real models, from the stored results: ``python benchmarks/plot_real_models.py``.

Reads ``results/real_models.json``, which ``real_models.py`` writes, ``results/alternatives.json``, which
``alternatives.py`` and ``peer_torch_pruning.py`` write, and ``results/published.json``, numbers that others publish.
Writes ``docs/_static/real-models-light.svg`` and ``-dark.svg``, and prints the table of the README and those of
docs/real-models.md. A test compares the pages and pictures with the results.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results" / "real_models.json"
PUBLISHED = HERE / "results" / "published.json"
ALTERNATIVES = HERE / "results" / "alternatives.json"
FIGURES = HERE.parent / "docs" / "_static"

NAMES = {"snpc": "{}", "layers": "{}, whole layers too"}  # of the rows of a table, by the way of pruning
RANKINGS = {"local": "in each layer", "global": "over all layers", "isomorphic": "over layers of one kind"}
UNITS = {
    "top1": "top-1",
    "spearman": "Spearman",
    "tokens": "tokens right",
    "perplexity": "perplexity",
    "words": "words right",
}
WIDTH, HEIGHT = 760, 430
LEFT, RIGHT, TOP, BOTTOM = 62, 170, 72, 56  # of the plot area, to the edges
LINE = 16  # between two labels
MIN_ROWS = 4  # of a model in the picture
EARLY = 0.45  # share of the MACs: lines that end before it have their labels above or below the end
NOTHING = 0.05  # of the dense model's score: as good as gone
MOST, LEAST = 1.0, 0.2  # shares of the MACs at the left and right edge
THEMES: Mapping[str, Mapping[str, str]] = {
    "light": {"ink": "#1f2328", "faint": "#656d76", "grid": "#d8dee4", "page": "#ffffff"},
    "dark": {"ink": "#e6edf3", "faint": "#9198a1", "grid": "#30363d", "page": "#0d1117"},
}
COLORS: Mapping[str, Sequence[str]] = {
    "light": ("#0969da", "#bc4c00", "#1a7f37"),
    "dark": ("#4493f8", "#f0883e", "#3fb950"),
}


def load_results() -> dict[str, Any]:
    return dict(json.loads(RESULTS.read_text()))


def share_of_macs(row: Mapping[str, Any], model: Mapping[str, Any]) -> float:
    return float(row["macs"] / model["dense"]["macs"]) if "macs" in row else float(row["target"])


def kept_quality(row: Mapping[str, Any], model: Mapping[str, Any]) -> float:
    """Share of the dense model's score; of a perplexity, which is better where it is lower, the inverse."""
    ratio = row["quality"] / model["dense"]["quality"]
    return float(1 / ratio if model["metric"] == "perplexity" else ratio)


def x_of(share: float) -> float:
    return LEFT + (MOST - share) / (MOST - LEAST) * (WIDTH - LEFT - RIGHT)


def y_of(kept: float) -> float:
    return TOP + (1 - kept) * (HEIGHT - TOP - BOTTOM)


def text(x: float, y: float, words: str, color: str, anchor: str = "start", size: int = 12, weight: str = "400") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" fill="{color}" text-anchor="{anchor}" font-size="{size}" '
        f'font-weight="{weight}">{escape(words)}</text>'
    )


def axes(theme: Mapping[str, str]) -> Iterator[str]:
    right, bottom = x_of(LEAST), y_of(0)
    for kept in (0, 0.25, 0.5, 0.75, 1):
        yield f'<path d="M{LEFT} {y_of(kept):.1f}H{right:.1f}" stroke="{theme["grid"]}"/>'
        yield text(LEFT - 8, y_of(kept) + 4, f"{100 * kept:.0f} %", theme["faint"], "end")
    for share in (1, 0.8, 0.6, 0.4, 0.2):
        yield text(x_of(share), bottom + 20, f"{100 * share:.0f} %", theme["faint"], "middle")
    yield text(
        (LEFT + right) / 2, bottom + 42, "multiply-accumulate operations that are left", theme["faint"], "middle"
    )
    title = "Share of the dense model's score that is kept, nothing trained"
    yield text(LEFT - 46, 24, title, theme["ink"], size=15, weight="600")
    note = "solid: snpc; dashed: selection by magnitude; diamonds: one-shot results that others publish"
    yield text(LEFT - 46, 44, note, theme["faint"])


def lines(theme: str, results: Mapping[str, Any]) -> Iterator[str]:
    """Each model twice, with a label at the end of each line. Those with few sizes are in the tables only."""
    scored = [name for name, model in results.items() if model["metric"] != "perplexity"]
    drawn = [name for name in scored if len(results[name]["rows"]) >= MIN_ROWS]
    labels = []
    for color, name in zip(COLORS[theme], drawn, strict=False):
        model = results[name]
        for way, dash, weight in (("snpc", "", "600"), ("selection", "5 4", "400")):
            rows = sorted((row for row in model["rows"] if row["way"] == way), key=lambda row: -row["target"])
            points = [(share_of_macs(row, model), kept_quality(row, model)) for row in rows]
            yield from line(points, color, dash)
            if not rows:
                continue
            x, y = x_of(points[-1][0]), y_of(points[-1][1])
            if points[-1][1] < NOTHING:  # the end of the line is among other labels
                yield text(x_of(points[0][0]) + 10, y_of(points[0][1]) - 10, f"{name}, {way}", color, weight=weight)
            elif points[-1][0] > EARLY:  # other lines go on behind its end
                yield text(x - 6, y - 24 if way == "snpc" else y + 18, f"{name}, {way}", color, weight=weight)
            else:
                labels.append((y, f"{name}, {way}", color, weight, x))
    taken = -LINE * 1.0
    for y, words, color, weight, x in sorted(labels):
        taken = max(y + 4, taken + LINE)
        yield text(x + 10, taken, words, color, weight=weight)


def line(points: Sequence[tuple[float, float]], color: str, dash: str) -> Iterator[str]:
    """From the dense model through ``points``, (share of the MACs, share of the score)."""
    placed = [(x_of(share), y_of(kept)) for share, kept in points]
    path = "L".join(f"{x:.1f} {y:.1f}" for x, y in [(x_of(1), y_of(1)), *placed])
    yield f'<path d="M{path}" fill="none" stroke="{color}" stroke-width="2.5" stroke-dasharray="{dash}"/>'
    yield from (f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3.5" fill="{color}"/>' for x, y in placed)


def published(theme: Mapping[str, str]) -> Iterator[str]:
    for entry in json.loads(PUBLISHED.read_text()):
        x = x_of(entry["macs"] / entry["dense"]["macs"])
        y = y_of(entry["quality"] / entry["dense"]["quality"])
        yield f'<path d="M{x:.1f} {y - 6:.1f}l6 6l-6 6l-6 -6z" fill="{theme["faint"]}"/>'
        yield text(x + 11, y - 8 if y > HEIGHT / 2 else y + 24, entry["name"], theme["faint"], size=11)


def figure(theme: str, results: Mapping[str, Any]) -> str:
    ink = THEMES[theme]
    parts = [*axes(ink), *published(ink), *lines(theme, results)]
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif" '
        f'role="img" aria-label="Accuracy against MACs">\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="{ink["page"]}"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def score(value: float, metric: str) -> str:
    return f"{value:.2f}" if metric == "perplexity" else f"{value:.1f} %"


def share(value: float, whole: float) -> str:
    return f"{100 * value / whole:.0f} %"


def table(results: Mapping[str, Any], every: bool) -> str:
    """Markdown: a row for each size. ``every``: all of them, else those that are marked for the README."""
    head = ("model", "score", "dense", "pruned", "selection only", "MACs left", "parameters left", "speed-up")
    found = [f"| {' | '.join(head)} |", f"|---|---|{'---:|' * (len(head) - 2)}"]
    for name, model in results.items():
        metric, dense = model["metric"], model["dense"]
        selected = {row["target"]: row for row in model["rows"] if row["way"] == "selection"}
        shown = [row for row in model["rows"] if row["way"] in NAMES and (every or row.get("readme"))]
        for row in sorted(shown, key=lambda row: (list(NAMES).index(row["way"]), -row["target"])):
            other = selected.get(row["target"])
            cells = (
                NAMES[row["way"]].format(name),
                UNITS[metric],
                score(dense["quality"], metric),
                score(row["quality"], metric),
                score(other["quality"], metric) if other else "",
                f"{100 * share_of_macs(row, model):.0f} %",
                share(row["params"], dense["params"]) if "params" in row else "",
                f"{row['speed_up']:.2f} x" if "speed_up" in row else "",
            )
            found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found) + "\n"


def published_table() -> str:
    """Markdown: what others publish."""
    found = ["| method | what | dense | pruned | MACs left |", "|---|---|---:|---:|---:|"]
    for entry in json.loads(PUBLISHED.read_text()):
        dense, name = entry["dense"], f"[{entry['name']}]({entry['source']})"
        scores = f"{dense['quality']:.2f} % | {entry['quality']:.2f} %"
        found.append(f"| {name} | {entry['what']} | {scores} | {share(entry['macs'], dense['macs'])} |")
    return "\n".join(found) + "\n"


def alternatives_table() -> str:
    """Markdown: what onnxsim leaves of each file, the smallest of its passes and forms."""
    results = json.loads(ALTERNATIVES.read_text())
    found = [f"| file | parameters | left by onnxsim {results['onnxsim']} |", "|---|---:|---:|"]
    for name, rows in results["files"].items():
        least = min(rows, key=lambda row: row["after"] / row["before"])
        found.append(f"| {name} | {least['before']:,} | {share(least['after'], least['before'])} |")
    return "\n".join(found) + "\n"


def peer_table() -> str:
    """Markdown: what Torch-Pruning leaves of the right answers, each setting beside snpc at the same target."""
    peer, ours = json.loads(ALTERNATIVES.read_text())["torch_pruning"], load_results()["ViT-Tiny"]["rows"]
    found = ["| scores | ranked | MACs left | Torch-Pruning | snpc |", "|---|---|---:|---:|---:|"]
    for row in peer["rows"]:
        [other] = [r["quality"] for r in ours if (r["way"], r["target"]) == ("snpc", row["target"])]
        ranked = RANKINGS[row["ranking"]] + (", residual stream too" if row["widths"] == "all" else "")
        cells = (row["scores"].capitalize(), ranked, share(row["macs"], 1), f"{row['quality']:.1f} %", f"{other:.1f} %")
        found.append(f"| {' | '.join(cells)} |")
    return "\n".join(found) + "\n"


def main() -> None:
    results = load_results()
    for theme in THEMES:
        (FIGURES / f"real-models-{theme}.svg").write_text(figure(theme, results))
    print(table(results, every=False))
    print(table(results, every=True))
    print(published_table())
    print(alternatives_table())
    print(peer_table())


if __name__ == "__main__":
    main()
