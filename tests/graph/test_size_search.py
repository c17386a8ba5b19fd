"""Sizes of dynamic dimensions are solved for, and others are made from them."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import onnx_ir as ir
import pytest

from snpc.graph.binding import DimRelation, DimSizes, alternative_dim_sizes, base_dim_sizes
from snpc.graph.size_search import choose_dim_sizes
from tests.passes.text_graphs import text_model

Array = npt.NDArray[Any]

SUM = """
    cached (float[B, N, 4] x, float[B, P, 4] past, float[B, T] mask) => (float[B, T, 4] present, float[B, T] y) {
        present = Concat <axis = 1> (past, x)
        s = ReduceSum <keepdims = 0> (present, axes)
        y = Add(s, mask)
    }"""
EQUAL = "equal (float[B, N, 4] x, float[B, M, 4] y) => (float[B, N, 4] z) { z = Add(x, y) }"
FIXED = "fixed (float[B, N, 4] x) => (float[B, N, 4] y) { y = Add(x, table) }"
WINDOWS = "windows (float[B, N, 4] x) => (float[B, W, 4] y) { y = Reshape(x, split) }"
SECOND = "second (float[B, N] x, float[C, N] y) => (float[B, N] z) { z = Add(x, y) }"


def solved(text: str, **weights: Array) -> DimSizes:
    dim_sizes, facts = choose_dim_sizes(ir.from_proto(text_model(text, weights)))
    assert all(shape is not None for shape in facts.shape.values())
    return dim_sizes


def test_a_mask_covers_past_and_new_tokens() -> None:
    sizes = solved(SUM, axes=np.array([2]))
    assert sizes["T"] == sizes["N"] + sizes["P"] and len(set(sizes.values())) == 4
    other = alternative_dim_sizes(sizes)
    assert other["T"] == other["N"] + other["P"] and all(other[name] != sizes[name] for name in sizes)


def test_two_names_of_one_length() -> None:
    sizes = solved(EQUAL)
    assert sizes["N"] == sizes["M"] != sizes["B"]


def test_two_names_of_the_batch() -> None:
    sizes = solved(SECOND)
    assert sizes["B"] == sizes["C"] != sizes["N"]


def test_a_constant_fixes_a_length() -> None:
    sizes = solved(FIXED, table=np.ones((9, 4), np.float32))
    assert sizes["N"] == 9 and alternative_dim_sizes(sizes)["N"] == 9


def test_a_window_makes_lengths_multiples() -> None:
    sizes = solved(WINDOWS, split=np.array([0, -1, 3, 4]))
    assert sizes["N"] % 3 == 0 and alternative_dim_sizes(sizes)["N"] % 3 == 0
    assert sizes["N"] != alternative_dim_sizes(sizes)["N"]


def test_all_dimensions_start_different() -> None:
    text = "many (float[B, N, M, 4] x, float[C, K] y, float[N] z) => (float[B, N, M, 4] w) { w = Add(x, x) }"
    sizes = base_dim_sizes(ir.from_proto(text_model(text, {})).graph)[0]
    assert len(set(sizes.values())) == len(sizes) == 5
    assert sizes["B"] == 2 and sizes["N"] > 3, "a vector's name that is an inner axis elsewhere is no batch"


def test_a_name_that_is_a_multiple_has_this_step() -> None:
    """torch.export calls the height and width of a model of patches ``14*rows`` and ``14*columns``."""
    model = ir.from_proto(text_model("many (float[B, 3, K, K] x) => (float[B, 3, K, K] w) { w = Add(x, x) }", {}))
    (value,) = model.graph.inputs
    value.shape = ir.Shape(["B", 3, "14*rows", "columns*14"])
    sizes = base_dim_sizes(model.graph)[0]
    assert sizes == {"B": 2, "14*rows": 70, "columns*14": 70}
    assert alternative_dim_sizes(sizes)["14*rows"] == 84
    value.shape = ir.Shape(["B", 3, "14*rows", "rows"])
    assert base_dim_sizes(model.graph)[0]["14*rows"] == 14 * 64


def test_wanted_sizes_keep_the_relation() -> None:
    sizes = DimSizes({"past": 13, "new": 7, "total": 20}, {"total": DimRelation(("past", "new"))})
    assert sizes.resized({"past": 128, "new": 128})["total"] == 256
    assert sizes.resized({"total": 64}, ["total"]) == {"past": 13, "new": 51, "total": 64}
    assert sizes.resized({"total": 64, "new": 4}, ["total", "new"])["past"] == 60


@pytest.mark.parametrize("step", [4, 12])
def test_steps_round_up(step: int) -> None:
    sizes = DimSizes({"n": 7}).stepped("n", step)
    assert sizes["n"] % step == 0 and sizes.resized({"n": 3 * step + 1})["n"] == 4 * step


def test_a_circle_of_relations_is_refused() -> None:
    sizes = DimSizes({"a": 7, "b": 7}, {"a": DimRelation(("b",))})
    assert sizes.related("b", DimRelation(("a",))) is None
