"""Dead rows: what is left out is exactly what no output depends on."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import snpc
from snpc.graph import choose_dim_sizes, infer_graph
from snpc.passes.analyze import cost_of
from snpc.passes.canonicalization.eliminate_dead_rows import EliminateDeadRows
from tests.models.exports import EXPORTS
from tests.oracle import analysis_of, feeds_of, relative_error, run, written

CLASSIFIERS = [name for name in EXPORTS if name.startswith(("vit_timm", "vit_hf"))]
OTHERS = ["gpt2__ts17", "llama__ts17", "swin_timm__ts17", "bart__ts17"]


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_class_token_models_do_less_and_say_the_same(name: str) -> None:
    analysis = analysis_of(name)
    assert 0.1 < analysis.dead_macs / analysis.cost.macs < 0.5
    after = run(written(analysis.traced_graph.model.clone()), feeds_of(name))
    for a, b in zip(run(analysis.model.path, feeds_of(name)), after, strict=True):
        assert relative_error(a, b) < 1e-5


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_use_every_row_stay_as_they_are(name: str) -> None:
    analysis = analysis_of(name)
    assert analysis.dead_macs == 0
    assert analysis.traced_graph.model is analysis.model.graph


def model_of(nodes: list[onnx.NodeProto], outputs: list[str], weights: dict[str, np.ndarray]) -> ir.Model:  # type: ignore[type-arg]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 6, 4])],
        [helper.make_tensor_value_info(o, TensorProto.FLOAT, None) for o in outputs],
        [numpy_helper.from_array(a, name) for name, a in weights.items()],
    )
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return ir.from_proto(onnx.shape_inference.infer_shapes(made))


RNG = np.random.default_rng(0)
WEIGHTS = {
    "w": RNG.standard_normal((4, 5)).astype(np.float32),
    "v": RNG.standard_normal((5, 3)).astype(np.float32),
    "pos": RNG.standard_normal((1, 6, 5)).astype(np.float32),
    "mix": RNG.standard_normal((6, 6)).astype(np.float32),
    "one": np.array(2),
    "two": np.array([4, 1]),
    "s0": np.array([1]),
    "s1": np.array([3]),
    "ax": np.array([1]),
}
HEAD = [
    helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
    helper.make_node("Add", ["a", "pos"], ["b"], name="add"),
    helper.make_node("Relu", ["b"], ["c"], name="act"),
    helper.make_node("MatMul", ["c", "v"], ["d"], name="second"),
]
PICKS = {
    "scalar": helper.make_node("Gather", ["d", "one"], ["y"], axis=1, name="pick"),
    "list": helper.make_node("Gather", ["d", "two"], ["y"], axis=1, name="pick"),
    "slice": helper.make_node("Slice", ["d", "s0", "s1", "ax"], ["y"], name="pick"),
}


def compared(model: ir.Model) -> tuple[float, bool]:
    """(share of MACs left, whether there was something to drop), after comparing outputs."""
    binding, facts = choose_dim_sizes(model)
    result = EliminateDeadRows(facts)(model)
    if not result.modified:
        return 1.0, False
    less = result.model
    feeds = {"x": RNG.standard_normal((2, 6, 4)).astype(np.float32)}
    share = cost_of(less, infer_graph(less, binding)).macs / cost_of(model, facts).macs
    for a, b in zip(run(ir.to_proto(model).SerializeToString(), feeds), run(written(less), feeds), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    return share, True


@pytest.mark.parametrize("pick", PICKS)
def test_every_way_to_pick_rows(pick: str) -> None:
    share, dropped = compared(model_of([*HEAD, PICKS[pick]], ["y"], WEIGHTS))
    assert dropped and share == pytest.approx({"scalar": 1, "list": 2, "slice": 2}[pick] / 6)


def test_a_value_that_is_an_output_keeps_all_its_rows() -> None:
    share, dropped = compared(model_of([*HEAD, PICKS["scalar"]], ["y", "c"], WEIGHTS))
    assert dropped and share == pytest.approx((4 * 5 + 5 * 3 / 6) / (4 * 5 + 5 * 3))


def test_rows_that_meet_each_other_are_all_needed() -> None:
    mixed = [
        HEAD[0],
        helper.make_node("MatMul", ["mix", "a"], ["b"], name="mixing"),
        helper.make_node("Relu", ["b"], ["d"], name="act"),
        PICKS["scalar"],
    ]
    share, dropped = compared(model_of(mixed, ["y"], WEIGHTS))
    assert dropped and share == pytest.approx((6 * 4 * 5 + 6 * 5) / (6 * 4 * 5 + 36 * 5))


def test_two_different_wishes_need_everything() -> None:
    other = helper.make_node("Gather", ["d", "two"], ["z"], axis=1, name="other")
    assert compared(model_of([*HEAD, PICKS["scalar"], other], ["y", "z"], WEIGHTS)) == (1.0, False)


def test_a_softmax_over_the_rows_needs_them_all() -> None:
    nodes = [*HEAD, helper.make_node("Softmax", ["d"], ["e"], axis=1, name="soft")]
    pick = helper.make_node("Gather", ["e", "one"], ["y"], axis=1, name="pick")
    assert compared(model_of([*nodes, pick], ["y"], WEIGHTS)) == (1.0, False)


def test_picking_most_rows_is_left_alone() -> None:
    most = {**WEIGHTS, "two": np.array([0, 1, 2, 3])}
    assert compared(model_of([*HEAD, PICKS["list"]], ["y"], most)) == (1.0, False)


def test_dead_rows_count_towards_a_target() -> None:
    analysis = analysis_of("vit_timm__ts17")
    share = 1 - 0.5 * analysis.dead_macs / analysis.cost.macs
    scores = snpc.score(analysis, "magnitude")
    assert snpc.make_slice_plan(scores, snpc.Budget(target=f"macs={share}")).keep == {}


@pytest.mark.parametrize(("axis", "left"), [("zero", 1 / 6), ("ax", 1.0)])
def test_who_asks_for_the_size_of_another_axis_asks_for_no_rows(axis: str, left: float) -> None:
    """An exporter computes the target of a later reshape from a value's own shape."""
    sizes = [
        helper.make_node("Shape", ["c"], ["sizes"], name="sizes"),
        helper.make_node("Gather", ["sizes", axis], ["size"], axis=0, name="size"),
        helper.make_node("ConstantOfShape", ["size"], ["zeros"], name="zeros"),
    ]
    weights = {**WEIGHTS, "zero": np.array([0])}
    share, dropped = compared(model_of([*HEAD, *sizes, PICKS["scalar"]], ["y", "zeros"], weights))
    first, second = 6 * 4 * 5, 6 * 5 * 3
    assert dropped and share == pytest.approx((left * first + second / 6) / (first + second))
