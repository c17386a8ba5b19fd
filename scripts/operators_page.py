"""Write docs/operators.md from the operator table: ``python scripts/operators_page.py`` (``--check`` only compares)."""

from __future__ import annotations

import sys
from pathlib import Path

from snpc.ops import operator_table
from snpc.ops.spec import OpSpec

PAGE = Path(__file__).resolve().parents[1] / "docs" / "operators.md"
KINDS = {
    "movement": "Positions move, values do not",
    "concat": "Several inputs laid end to end",
    "sample": "Channels, read at positions that others give",
    "scatter": "Parts of a tensor written over",
    "choose": "The largest along an axis",
    "one_hot": "Rows with one entry",
    "experts": "Experts in one node",
    "pointwise": "One position at a time",
    "contraction": "Sums of products",
    "attention": "Attention in one node",
    "rotary": "Rotary positions in one node",
    "normalize": "Statistics along axes, same axes out",
    "reduce": "Axes that disappear",
    "shape": "Shapes and constants",
    "opaque": "Pinned, with the reason",
}
HEAD = """# Operators

What each operator means to snpc. Written by `python scripts/operators_page.py` from the table in `snpc/ops`; a test
compares. [adding-an-operator.md](adding-an-operator.md) says what the kinds mean and how to add one.

All operators of ai.onnx up to opset 24 are here, those of ai.onnx.ml and the preview domains, and of com.microsoft the
ones that onnxruntime's transformer optimizer and its quantisers write. Of any other operator snpc says "no entry in the
operator table", and what it touches keeps its width. Models with `If`, `Loop` or `Scan` are cut outside of these;
functions of the model itself are inlined first.
"""


def name(spec: OpSpec) -> str:
    return f"`{spec.domain}.{spec.name}`" if spec.domain else f"`{spec.name}`"


def section(kind: str, title: str, specs: list[OpSpec]) -> str:
    lines = [f"## {title}", "", f"Kind `{kind}`.", "", "| operators | what they mean |", "|---|---|"]
    meanings: dict[str, list[str]] = {}
    for spec in specs:
        meanings.setdefault(meaning(spec), []).append(name(spec))
    return "\n".join([*lines, *(f"| {', '.join(sorted(names))} | {says} |" for says, names in meanings.items())])


def meaning(spec: OpSpec) -> str:
    """What the entry says, and what the user reads of axes that stay where it says more."""
    if spec.kind == "opaque":
        return spec.reason
    return f'{spec.summary} ("{spec.reason}")' if spec.reason else spec.summary


def page() -> str:
    specs = list(operator_table().values())
    missing = {s.kind for s in specs} - set(KINDS)
    assert not missing, f"say in KINDS what {missing} is"
    made = [section(kind, title, [s for s in specs if s.kind == kind]) for kind, title in KINDS.items()]
    return "\n".join([HEAD, "\n\n".join(made), ""])


def main() -> int:
    if "--check" in sys.argv:
        return int(not PAGE.exists() or PAGE.read_text() != page())
    PAGE.write_text(page())
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
