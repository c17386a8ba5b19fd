"""Einsum nodes of one, three and more operands are expanded, and compute what they did."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from snpc.passes.canonicalization.expand_einsum import ExpandEinsum
from tests.passes.text_graphs import op_types, outputs_of, text_model

SIZES = dict(zip("abcde", (2, 3, 4, 5, 6), strict=True))


def einsum_model(equation: str, version: int = 17) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    terms, _, out = equation.partition("->")
    rng = np.random.default_rng(0)
    feeds = {
        f"x{k}": rng.standard_normal([SIZES[c] for c in term if c in SIZES]) for k, term in enumerate(terms.split(","))
    }
    inputs = ", ".join(f"double[{', '.join(map(str, v.shape))}] {name}" for name, v in feeds.items())
    rank = ", ".join(str(SIZES[c]) for c in out)
    text = f"""
        sum ({inputs}) => (double[{rank}] y) {{ y = Einsum <equation = "{equation}"> ({", ".join(feeds)}) }}"""
    return text_model(text, {}, version), feeds


@pytest.mark.parametrize("version", [12, 17])
@pytest.mark.parametrize(
    "equation", ["ab->ba", "ab->b", "abc->ca", "ab,bc,cd->ad", "ab,ac,ad->bcd", "ab,bc,cd,de->ae", "ab,bc,cd->b"]
)
def test_an_expanded_sum_computes_the_same(equation: str, version: int) -> None:
    proto, feeds = einsum_model(equation, version)
    result = ExpandEinsum()(ir.from_proto(proto))
    assert result.modified
    assert all(len(node.inputs) == 2 for node in result.model.graph if node.op_type == "Einsum")
    onnx.checker.check_model(ir.to_proto(result.model))
    (expected,), (actual,) = outputs_of(proto, feeds), outputs_of(result.model, feeds)
    np.testing.assert_allclose(actual, expected, rtol=1e-12, atol=1e-12)


def test_the_nodes_of_an_expansion() -> None:
    for equation, nodes in {
        "abc->ca": ["ReduceSum", "Transpose"],
        "ab->ba": ["Transpose"],
        "ab,bc,cd,de->ae": ["Einsum"] * 3,
    }.items():
        assert op_types(ExpandEinsum()(ir.from_proto(einsum_model(equation)[0])).model) == nodes


@pytest.mark.parametrize("equation", ["ab,bc->ac", "aa->a", "...ab->...ba"])
def test_what_has_two_operands_or_no_plain_letters_stays(equation: str) -> None:
    operands = "x0, x1" if "," in equation else "x0"
    node = f'y = Einsum <equation = "{equation}"> ({operands})'
    model = ir.from_proto(text_model(f"sum (double[3, 3] x0, double[3, 3] x1) => (double[M, N] y) {{ {node} }}", {}))
    result = ExpandEinsum()(model)
    assert not result.modified and op_types(model) == ["Einsum"]
