"""Prune every .onnx file of a folder and say what came of it: one row per file, failures at the end.

    python benchmarks/zoo.py FOLDER [--ratio 0.5] [--closed] [--only TEXT ...] [--expected TABLE] [--markdown]
        [--json out.json]

Each file is loaded, pruned by weight magnitude (``--closed``: in closed form, all layers alike), verified against its
masked original and run once more as onnxruntime runs it by default, in a process of its own. Inputs are read from
FILE.npz beside FILE.onnx where there is one, and are random otherwise. An attention is a softmax that products of two
activations reach, or a fused attention node; it is "found" where the width that query and key share can be cut, else
the first reason why not is shown. ``--expected`` names a Markdown table with the number of attentions in the column
after the file's name.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
BARS = {"float16": 1e-2, "bfloat16": 2e-2}  # relative, of what rounding explains; 1e-4 for the rest


def examine(path: Path, ratio: float, closed: bool) -> dict[str, Any]:
    """Everything that the table says of one file. Raises where a step fails."""
    import snpc

    start = time.perf_counter()
    model = snpc.load(path)
    analysis = snpc.analyze(model)
    data = path.with_suffix(".npz")
    calibration = snpc.load_calibration(str(data), model.inputs) if data.is_file() else None
    if closed and calibration is None:
        calibration = snpc.random_calibration(analysis, samples=4)
    found = [
        next(filter(None, (reason_against(analysis, c) for c in scores)), "")
        for scores in attentions(analysis.traced_graph)
    ]
    row: dict[str, Any] = {
        "attentions": len(found),
        "found": found.count(""),
        "reasons": dict(Counter(reason for reason in found if reason)),
        "prunable": sum(g.prunable for g in analysis.groups),
        "pinned": sum(not g.prunable for g in analysis.groups),
    }
    choice = snpc.Budget(ratio, uniform=closed)
    how: dict[str, Any] = {"method": "auto"} if closed else {"method": "select", "criterion": "magnitude"}
    decision = snpc.plan(analysis, choice, calibration=calibration, **how)
    with tempfile.TemporaryDirectory(prefix="snpc-zoo-") as folder:
        target = Path(folder) / "pruned.onnx"
        result = snpc.apply(decision, target)
        row["runs"] = runs(target, model.inputs, calibration)
    row["params"] = result.after.params / max(result.before.params, 1)
    row["macs"] = result.after.macs / max(result.before.macs, 1)
    row["error"] = max((d.relative for d in result.verification.equals_mask), default=None)
    row["compared"] = result.verification.compared
    row["bar"] = BARS.get(common_type(model.graph), 1e-4)
    row["seconds"] = time.perf_counter() - start
    return row


def common_type(graph: Any) -> str:
    kinds = [v.dtype.name.lower() for v in graph.graph.initializers.values() if v.dtype.is_floating_point()]
    return Counter(kinds).most_common(1)[0][0] if kinds else "float"


def runs(path: Path, inputs: Any, calibration: Any) -> bool:
    """With every optimisation of onnxruntime, which rewrites more of the graph than verification does."""
    from snpc.runtime.execution.feeds import random_feeds
    from snpc.runtime.execution.session import open_session, run_session

    session = open_session(path, optimization="all")
    feeds = next(iter(calibration.batches())) if calibration is not None else random_feeds(inputs, batch=2)
    names = {i.name for i in session.get_inputs()}
    return bool(run_session(session, {k: v for k, v in feeds.items() if k in names}))


def attentions(traced: Any) -> Iterator[list[Any]]:
    """The contractions that make the scores of each attention: one, or several that are added up before the softmax."""
    behind: dict[Any, list[Any]] = {}
    for contraction in traced.trace.contractions:
        if contraction.part == "scores":
            yield [contraction]
        elif not contraction.part and all(map(is_projected, contraction.node.inputs)):
            softmax = softmax_of(contraction.node)
            if softmax is not None:
                behind.setdefault(softmax, []).append(contraction)
    yield from behind.values()


def is_projected(value: Any) -> bool:
    """Not a weight or an input as it is: a product makes it, of constants as may be (a decoder's learnt queries)."""
    from snpc.ops import lookup

    todo, seen = [value], set()
    while todo:
        node = todo.pop().producer()
        if node is None or node in seen:
            continue
        seen.add(node)
        kind = lookup(node.domain, node.op_type).kind
        if kind in ("contraction", "attention", "opaque"):
            return True
        todo += [v for v in node.inputs if v is not None] if kind != "shape" else []
    return False


def softmax_of(node: Any) -> Any:
    """The softmax that a node's output reaches through operators that keep positions, and no other product."""
    from snpc.ops import lookup

    todo, seen = list(node.outputs), set()
    while todo:
        for user in todo.pop().consumers():
            if user.op_type == "Softmax":
                return user
            kind = lookup(user.domain, user.op_type).kind
            if user not in seen and kind in ("movement", "pointwise", "concat"):
                seen.add(user)
                todo += user.outputs
    return None


def reason_against(analysis: Any, scores: Any) -> str:
    """Empty where the summed width is a group that can be cut, else what pins it."""
    from snpc.passes.propagation.labels import varying_axes

    units = analysis.traced_graph.units.unit_of_label
    free = {(site.tensor, site.axis) for g in analysis.groups if g.prunable and g.role == "qk" for site in g.sites}
    axes = [a for a in analysis.traced_graph.trace.table.axes if (str(a.constant.name), a.axis) in free]
    cuttable = {int(u) for a in axes for u in units[a.first_label : a.first_label + a.size]}
    mine: set[int] = set()
    for side, letters in ((scores.left, scores.letters.left), (scores.right, scores.letters.right)):
        for labels in side.factors:
            if any(letters[k] not in scores.letters.out for k in varying_axes(labels)):
                mine |= {int(u) for u in units[labels[labels >= 0]]}
    if mine and mine <= cuttable:
        return ""
    reasons = [n.reason for n in analysis.traced_graph.trace.table.pins if mine & {int(u) for u in units[n.labels]}]
    if reasons:
        return reasons[0]
    if not mine and scores.left.factors and scores.right.factors:
        return "what is summed over is no width that a weight makes (tokens, say)"
    strangers = [side.unlabeled_reason or f"{side.name} holds no width that a float weight makes"
                 for side in (scores.left, scores.right) if not side.factors]  # fmt: skip
    return (strangers or ["nothing says why"])[0]


# -- one process per file, and the table -----------------------------------------------------------------------------


def row_of(path: Path, ratio: float, closed: bool, limit: int) -> dict[str, Any]:
    words = [sys.executable, __file__, str(path), "--ratio", str(ratio), "--one", *(["--closed"] if closed else [])]
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=limit, check=False, env=env)
    except subprocess.TimeoutExpired:
        return {"failed": f"took longer than {limit} s"}
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"the process ended with {done.returncode}"]
        return {"failed": lines[-1][:300]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def complaint(row: dict[str, Any], expected: int | None) -> str:
    if "failed" in row:
        return str(row["failed"])
    if row["error"] is None:
        return f"was not compared with its masked original ({row['compared']})"
    if not row["error"] <= row["bar"]:
        return f"differs from its masked original by {row['error']:.1e} relative"
    if expected is not None and row["attentions"] != expected:
        return f"{row['attentions']} attentions seen, {expected} expected"
    return ""


def expectations(table: Path | None) -> dict[str, int]:
    rows = re.findall(r"^\|\s*([^|\s]+)\s*\|\s*(\d+)\s*\|", table.read_text(), re.MULTILINE) if table else []
    return {name: int(count) for name, count in rows}


def show(name: str, row: dict[str, Any], expected: int | None, markdown: bool) -> None:
    if "failed" in row:
        cells = [name, "failed", "", "", "", "", "", "", row["failed"]]
    else:
        error = "-" if row["error"] is None else f"{row['error']:.0e}"
        said = "; ".join(f"{count} x {reason}" for reason, count in row["reasons"].items())
        seen = f"{row['found']}/{row['attentions']}" + ("" if expected is None else f" of {expected}")
        cells = [name, seen, row["prunable"], row["pinned"], f"{row['params']:.2f}", f"{row['macs']:.2f}",
                 error, f"{row['seconds']:.0f}", said]  # fmt: skip
    print("| " + " | ".join(map(str, cells)) + " |" if markdown else "  ".join(map(str, cells)), flush=True)


HEADS = ("file", "attentions found", "groups", "pinned", "parameters", "MACs", "against masked", "seconds", "not found")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--closed", action="store_true", help="in closed form, fitted to the inputs")
    parser.add_argument("--only", nargs="*", default=[], help="files whose name contains one of these")
    parser.add_argument("--expected", type=Path, help="Markdown table: | file | attentions |")
    parser.add_argument("--limit", type=int, default=600, help="seconds per file")
    parser.add_argument("--markdown", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(examine(arguments.folder, arguments.ratio, arguments.closed)))
        return
    expected = expectations(arguments.expected)
    paths = [p for p in sorted(arguments.folder.glob("*.onnx"))
             if not arguments.only or any(text in p.name for text in arguments.only)]  # fmt: skip
    if arguments.markdown:
        print("| " + " | ".join(HEADS) + " |\n|---" * 1 + "|---" * (len(HEADS) - 1) + "|")
    rows: dict[str, Any] = {}
    wrong: dict[str, str] = {}
    for path in paths:
        row = rows[path.stem] = row_of(path, arguments.ratio, arguments.closed, arguments.limit)
        show(path.stem, row, expected.get(path.stem), arguments.markdown)
        words = complaint(row, expected.get(path.stem))
        if words:
            wrong[path.stem] = words
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    print(f"\n{len(paths) - len(wrong)} of {len(paths)} files hold")
    for name, words in wrong.items():
        print(f"{name}: {words}")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
