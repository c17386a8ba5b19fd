"""Operators that no export of the suite has, or not in every form: a small model each, where slicing equals masking."""

from __future__ import annotations

import itertools
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import defs
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import snpc
from snpc.ops import lookup, operator_table
from snpc.passes.analyze import Analysis
from snpc.passes.weights.edits import WeightEdits, apply_edits
from snpc.planning.tied_widths import tied_sets
from snpc.runtime.closed_form.fit import apply_basis
from snpc.types import Group
from tests.models.operators import CASES, MHA, Case, build, feeds_for, widths
from tests.oracle import TOLERANCE, analysis_at, cut, prunable, random_cuts, relative_error, run, written

ROOT = Path(__file__).resolve().parents[2]
LAST_OPSET = 24


def schemas() -> list[tuple[str, str]]:
    known = {
        (s.domain, s.name) for s in defs.get_all_schemas_with_history() if s.domain or s.since_version <= LAST_OPSET
    }
    return sorted(known)


@pytest.mark.parametrize(("domain", "name"), schemas())
def test_every_operator_has_an_entry(domain: str, name: str) -> None:
    spec = operator_table().get((domain, name))
    assert spec is not None, f"{domain}.{name} is in no family of snpc/ops"
    assert spec.summary
    assert spec.kind != "opaque" or spec.reason


def test_an_unknown_operator_is_opaque_and_says_so() -> None:
    for domain, name in (("acme", "Wobble"), ("", "Wobble"), ("com.microsoft", "Wobble")):
        spec = lookup(domain, name)
        assert spec.kind == "opaque"
        assert f"no entry for {domain + '.' if domain else ''}Wobble" in spec.reason


def test_the_page_of_operators_is_up_to_date(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    sys.modules.pop("operators_page", None)
    import operators_page

    assert operators_page.PAGE.read_text() == operators_page.page(), "run python scripts/operators_page.py"


# -- slicing equals masking --------------------------------------------------------------------------------------------


def found(analysis: Analysis) -> Counter[tuple[str, int, int]]:
    return Counter((g.role, g.blocks, g.size) for g in prunable(analysis.groups))


def check(case: Case, analysis: Analysis, groups: list[Group], original: Path, ratio: float) -> None:
    feeds = feeds_for(case)
    pair = cut(analysis, random_cuts(groups, 5, ratio))
    masked = run(pair.masked, feeds)
    heard = any(g.role != "other" for g in groups)  # "other": made, and read by nobody
    assert (relative_error(run(original, feeds), masked) > 1e-3) == heard, "the mask silences nothing"
    for level in ("off", "all"):
        assert relative_error(masked, run(pair.sliced, feeds, level)) < TOLERANCE, [g.id for g in groups]
    assert len(pair.sliced) < len(pair.masked)


@pytest.mark.parametrize("name", CASES)
def test_slicing_equals_masking(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    analysis = analysis_at(tmp_path / "model.onnx", build(case))
    assert found(analysis) == Counter(case.groups), [(p.tensor, p.axis, p.reason, p.operator) for p in analysis.pins]
    groups = prunable(analysis.groups)
    for members in tied_sets(groups):
        check(case, analysis, list(members), tmp_path / "model.onnx", 0.5)
    check(case, analysis, [g for g in groups if g.role != "head"], tmp_path / "model.onnx", 0.5)
    check(case, analysis, groups, tmp_path / "model.onnx", 0.3)


FITTED = [
    name
    for name in CASES
    if name.startswith(("einsum", "heads", "attention", "multi", "packed", "grouped", "decoder", "rotary", "tile"))
]


@pytest.mark.parametrize("name", FITTED)
def test_a_change_of_basis_alone_changes_nothing(name: str, tmp_path: Path) -> None:
    """Where a node has a closed form at all; and what is fitted and cut is verified like anything else."""
    case = CASES[name]
    analysis, feeds = analysis_at(tmp_path / "model.onnx", build(case)), feeds_for(case)
    data = snpc.load_calibration(feeds, analysis.model.inputs, batch=64)
    groups = [g for g in analysis.groups if g.prunable and g.role in ("qk", "vo", "ffn")]
    fitted, edits = (
        snpc.solve_closed_forms(analysis, snpc.measure_statistics(analysis, data, groups), groups),
        WeightEdits(),
    )
    for group in groups:
        if fitted.kinds.get(group.id) in ("low_rank_qk", "low_rank_vo"):
            apply_basis(edits, fitted, group)
    before = run(tmp_path / "model.onnx", feeds)
    assert relative_error(before, run(written(apply_edits(analysis.traced_graph, edits)), feeds)) < 1e-5
    made = snpc.plan(analysis, snpc.Budget(0.5), calibration=data)
    snpc.apply(made, tmp_path / "half.onnx")


class PackedMultiHeadAttention(OpRun):
    """Tokens of all samples in one row: offsets[b] to offsets[b + 1] are those of sample b."""

    op_domain = "com.microsoft"

    def _run(self, query, key, value, bias, offsets, lengths, scores=None, num_heads=None, scale=None):
        widths = np.cumsum([query.shape[1], key.shape[1]])
        q, k, v = (x + b for x, b in zip((query, key, value), np.split(bias, widths), strict=True))
        q, k, v = (x.reshape(len(x), num_heads, -1).swapaxes(0, 1) for x in (q, k, v))
        out = np.zeros((len(query), v.shape[0] * v.shape[2]), query.dtype)
        for first, last in itertools.pairwise(lengths):
            mine = slice(first, last)
            s = q[:, mine] @ k[:, mine].swapaxes(1, 2) * (scale or q.shape[2] ** -0.5)
            p = np.exp(s - s.max(-1, keepdims=True))
            p /= p.sum(-1, keepdims=True)
            out[mine] = (p @ v[:, mine]).swapaxes(0, 1).reshape(last - first, -1)
        return (out.astype(query.dtype),)


def test_packed_multi_head_attention(tmp_path: Path) -> None:
    """onnxruntime runs it on GPUs only, so a class above stands in."""
    case = Case(
        """<ir_version: 10, opset_import: ["": 17, "com.microsoft": 1]>
        g (float[T, 16] x, int32[B, N] at, int32[M] ends) => (float[T, 16] y) {
            q = MatMul(x, wq)  k = MatMul(x, wk)  v = MatMul(x, wv)
            c = com.microsoft.PackedMultiHeadAttention <num_heads = 4> (q, k, v, b, at, ends)  y = MatMul(c, wo)
        }""",
        {**widths(24, 24, 32), "b": (80,)},
        MHA,
        {"x": (9, 16)},
        ints={"at": np.arange(10, dtype=np.int32).reshape(2, 5), "ends": np.array([0, 4, 9], np.int32)},
    )
    analysis = analysis_at(tmp_path / "model.onnx", build(case))
    assert found(analysis) == Counter(case.groups)
    for roles in (("qk",), ("vo",), ("head",), ("qk", "vo", "head")):
        pair = cut(analysis, random_cuts(prunable(analysis.groups, *roles), 3, 0.5))
        sliced, masked = (
            ReferenceEvaluator(onnx.load_from_string(model), new_ops=[PackedMultiHeadAttention]).run(
                None, feeds_for(case)
            )
            for model in (pair.sliced, pair.masked)
        )
        assert relative_error(masked, sliced) < TOLERANCE, roles
