"""Closed forms beyond one matrix per group: whole heads, shared weights, shared values, kernels, and gated layers."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import snpc
from snpc.passes.analyze import Analysis
from snpc.passes.weights.attention_operands import score_products
from snpc.passes.weights.consumers import consumer_uses, consumer_weights, single_consumer_weight
from snpc.passes.weights.edits import existing_bias
from snpc.pipeline.planner import PruningPlan
from snpc.planning.config import Budget
from snpc.planning.plan import SlicePlan
from snpc.runtime.closed_form.fit import ClosedForms, fit_parallel
from snpc.types import FloatArray, Group, Role
from tests.closed_forms import (
    Feeds,
    analyzed_bytes,
    calibration_of,
    pruned_bytes,
    random_feeds,
    relative_change,
    tensor_values,
)
from tests.models.exports import export
from tests.oracle import analysis_of, feeds_of, relative_error, run, written

SAMPLES = 48  # more rows than any group here has columns, else nothing is lost that damping does not hide
CASES: tuple[tuple[str, Role], ...] = (
    ("vit_timm__ts17", "head"),
    ("bert__dyn20_sdpa", "head"),
    ("gpt2__ts17", "head"),
    ("t5_gated__ts17", "head"),
    ("albert__ts17", "head"),
    ("linear_attention__ts17", "head"),
    ("qwen3__ts17", "head"),
    ("gemma__ts17", "head"),
    ("llama__dyn20", "ffn"),
    ("t5_gated__ts17", "ffn"),
    ("albert__ts17", "ffn"),
    ("convnet__ts17", "conv"),
    ("convchain__ts17", "conv"),
    ("convchain__dyn20", "conv"),
)


def groups_of(analysis: Analysis, role: Role) -> list[Group]:
    return [g for g in analysis.groups if g.role == role and g.prunable and g.size > 1]


@functools.cache
def found_for(name: str, role: Role) -> tuple[ClosedForms, Feeds]:
    """The closed forms of a role, measured on more data than the export came with."""
    analysis, feeds = analysis_of(name), random_feeds(name, SAMPLES)
    groups = groups_of(analysis, role)
    assert groups
    one_batch = calibration_of(analysis, feeds, SAMPLES)  # it has no halves: the ridge of a rule
    statistics = snpc.measure_statistics(analysis, one_batch, groups)
    return snpc.solve_closed_forms(analysis, statistics, groups), feeds


def keeping(analysis: Analysis, found: ClosedForms, group: Group, kept: int) -> SlicePlan:
    """The plan that keeps the ``kept`` units that go last."""
    best = tuple(sorted(found.elimination_orders[group.id][0].order[group.size - kept :].tolist()))
    return SlicePlan(analysis, "by hand", {}, {group.id: (best,)}, "parallel")


def outputs_of(model: bytes, analysis: Analysis, group: Group) -> list[str]:
    """What each node that reads the group gives, with the bias that is added to it."""
    nodes = {n.name: n for n in onnx.load_from_string(model).graph.node}
    constants = {t.name for t in onnx.load_from_string(model).graph.initializer}
    names = []
    for node in (node for reader in consumer_weights(analysis.traced_graph, group) for node in reader.nodes):
        output = nodes[str(node.name)].output[0]
        users = [n for n in nodes.values() if output in n.input]
        if len(users) == 1 and users[0].op_type == "Add" and constants & set(users[0].input):
            output = users[0].output[0]
        names.append(output)
    return names


@pytest.mark.parametrize(("name", "role"), CASES)
def test_predicted_loss_is_the_measured_one(name: str, role: Role) -> None:
    """In a model in which nothing else is cut; of layers that share a group, each on what the dense ones give it."""
    found, feeds = found_for(name, role)
    analysis = analysis_of(name)
    for group in groups_of(analysis, role)[:2]:
        assert found.kinds[group.id] == "refit"
        for kept in sorted({1, group.size // 4, group.size // 2} - {0}):
            plan = keeping(analysis, found, group, kept)
            if len([node for r in consumer_weights(analysis.traced_graph, group) for node in r.nodes]) > 1:
                measured = lost_by_layers(found, plan, group, feeds)
            else:
                model = pruned_bytes(PruningPlan(plan, found))
                (before,) = tensor_values(
                    analyzed_bytes(name), outputs_of(analyzed_bytes(name), analysis, group), feeds
                )
                (after,) = tensor_values(model, outputs_of(model, analysis, group), feeds)
                measured = float(np.sum((after - before) ** 2))
            curve = found.loss_curve(group)
            assert curve is not None
            assert curve[kept] > 1e-3 * curve[0]
            # exact where the inverse was refreshed, and read off a line between
            exact = group.size <= 48 or (group.size - kept) % -(-group.size // 48) == 0
            assert measured == pytest.approx(curve[kept], rel=1e-2 if exact else 0.1)


def lost_by_layers(found: ClosedForms, plan: SlicePlan, group: Group, feeds: Feeds) -> float:
    """The squared change of what each node gives for the dense activations, with the weights and biases as fitted."""
    source, fitted = found.analysis.traced_graph, fit_parallel(found, plan)
    total = 0.0
    for uses in consumer_uses(source, group):
        reader = uses[0].consumer
        change = reader.matrix(fitted) - reader.matrix(source)
        for use in uses:
            (seen,) = tensor_values(written(source.model.clone()), [use.probe.tensor], feeds)
            columns = rows(seen)[:, np.argsort(use.probe.units.reshape(-1), kind="stable")]
            shift = bias_at(fitted.model, str(use.node.name), reader.width)
            shift = shift - bias_at(source.model, str(use.node.name), reader.width)
            total += float(np.sum((columns @ change + shift) ** 2))
    return total


def bias_at(model: ir.Model, node: str, width: int) -> FloatArray:
    """What is added to the output of a node."""
    found = next(n for n in model.graph if n.name == node)
    held = existing_bias(found, width)
    if held is None or held.const_value is None:
        return np.zeros(width)
    return held.const_value.numpy().astype(np.float64).reshape(-1)


def rows(values: FloatArray) -> FloatArray:
    return values.reshape(-1, values.shape[-1])


@pytest.mark.parametrize(("name", "role"), CASES)
def test_keeping_everything_changes_nothing(name: str, role: Role) -> None:
    found, _ = found_for(name, role)
    analysis, feeds = analysis_of(name), feeds_of(name)
    keep = {g.id: (tuple(range(g.size)),) for g in groups_of(analysis, role)}
    model = pruned_bytes(PruningPlan(SlicePlan(analysis, "by hand", {}, keep, "parallel"), found))
    assert relative_error(run(export(name), feeds), run(model, feeds)) < 1e-4


@pytest.mark.parametrize(("name", "role"), [*CASES, ("convnet__ts17", "residual"), ("albert__ts17", "qk")])
def test_less_moves_than_by_selection(name: str, role: Role, tmp_path: Path) -> None:
    analysis, feeds = analysis_of(name), feeds_of(name)
    data, before = calibration_of(analysis, random_feeds(name, 24), 8), run(export(name), feeds)
    choice = Budget(0.5, (role,))
    drifts = []
    for method, criterion in (("auto", None), ("select", "magnitude"), ("select", "mixed")):
        made = snpc.plan(analysis, choice, calibration=data, method=method, criterion=criterion)  # type: ignore[arg-type]
        result = snpc.apply(made, tmp_path / "p.onnx")
        drifts.append(relative_change(before, run(result.path, feeds)))
    assert drifts[0] < 0.98 * min(drifts[1:])


@pytest.mark.parametrize("name", ["vit_timm__ts17", "t5_gated__ts17", "albert__ts17"])
def test_heads_and_widths_go_together(name: str, tmp_path: Path) -> None:
    """The basis of the values is that of what is left of the heads."""
    analysis, feeds = analysis_of(name), feeds_of(name)
    data, before = calibration_of(analysis, random_feeds(name, 24), 8), run(export(name), feeds)
    drifts = []
    for method, criterion in (("auto", None), ("parallel", None), ("select", "mixed")):
        choice = Budget(0.4, ("head", "vo", "qk"), uniform=True)
        made = snpc.plan(analysis, choice, calibration=data, method=method, criterion=criterion)  # type: ignore[arg-type]
        assert {g.role for g in analysis.groups if g.id in made.slices.keep} >= {"head", "vo"}
        result = snpc.apply(made, tmp_path / "p.onnx")
        drifts.append(relative_change(before, run(result.path, feeds)))
    assert drifts[1] < 0.98 * drifts[2]
    assert drifts[0] < 1.1 * drifts[2]


# -- values that several query heads, or several layers, read --------------------------------------------------------


@pytest.mark.parametrize("name", ["llama__ts17", "albert__ts17"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_predicted_loss_of_shared_values(name: str, share: float) -> None:
    """Query head by query head, and layer by layer: each has its own mean and its own rows of the projection."""
    found, feeds = found_for(name, "vo")
    analysis = analysis_of(name)
    group = groups_of(analysis, "vo")[0]
    kept = round(group.size * share)
    keep = {group.id: tuple(tuple(range(kept)) for _ in range(group.blocks))}
    fitted = fit_parallel(found, SlicePlan(analysis, "by hand", {}, keep, "parallel"))
    reader = single_consumer_weight(analysis.traced_graph, group)
    assert len(reader.weight_slice.index) > 1 or len(reader.nodes) > 1
    measured = 0.0
    for tensor in (p.tensor for p in group.probes if p.kind == "context"):
        context = rows(tensor_values(analyzed_bytes(name), [tensor], feeds)[0])
        for block, part in enumerate(found.bases[group.id]):
            before, after = reader.rows(analysis.traced_graph, block), reader.rows(fitted, block)
            assert not after[:, kept:].any()
            for index, old, new in zip(reader.weight_slice.index, before, after, strict=True):
                gap = context[:, index[block]] @ (part.encode[:, :kept] @ new[:kept] - old)
                measured += float(np.sum((gap - gap.mean(0)) ** 2))
    curve = found.loss_curve(group)
    assert curve is not None
    assert measured == pytest.approx(curve[kept], rel=1e-2)
    assert measured > 1e-4 * curve[0]


def test_every_layer_of_shared_weights_keeps_its_own_mean() -> None:
    """One weight, three layers: the means of what is cut go into three biases."""
    name = "albert__ts17"
    found, feeds = found_for(name, "ffn")
    analysis = analysis_of(name)
    (group,) = groups_of(analysis, "ffn")
    (reader,) = consumer_weights(analysis.traced_graph, group)
    assert len(reader.nodes) == 3
    model = pruned_bytes(PruningPlan(keeping(analysis, found, group, 24), found))
    before = tensor_values(analyzed_bytes(name), outputs_of(analyzed_bytes(name), analysis, group), feeds)
    after = tensor_values(model, outputs_of(model, analysis, group), feeds)
    # the first layer sees what it saw before; the later ones see what the cut ones give them
    assert np.abs(rows(before[0]).mean(0) - rows(after[0]).mean(0)).max() < 1e-5 * np.abs(before[0]).max()


# -- kernels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["convchain__ts17", "convchain__dyn20"])
def test_kernels_are_refitted_at_every_offset(name: str, tmp_path: Path) -> None:
    """Strides, padding and dilations are the reader's; a bias that it lacks becomes its third input."""
    analysis = analysis_of(name)
    groups = groups_of(analysis, "conv")
    readers = {r.taps: r for g in groups for r in consumer_weights(analysis.traced_graph, g)}
    assert set(readers) == {1, 9}
    data = calibration_of(analysis, random_feeds(name, 24), 8)
    made = snpc.plan(analysis, Budget(0.5, ("conv",)), calibration=data)
    assert made.closed_forms is not None
    assert set(made.closed_forms.kinds.values()) == {"refit"}
    result = snpc.apply(made, tmp_path / "p.onnx")
    nodes = {n.name: n for n in onnx.load(result.path).graph.node}
    for reader in readers.values():
        if existing_bias(reader.node, reader.width) is None:
            assert len(reader.node.inputs) == 2
        assert len(nodes[str(reader.node.name)].input) == 3
    assert not [n for n in nodes.values() if n.name.endswith("__bias")]


def test_statistics_of_kernels_are_those_of_patches() -> None:
    """What the instrumented graph sums is X'X of the columns that the kernel multiplies."""
    name = "convchain__ts17"
    found, feeds = found_for(name, "conv")
    analysis = analysis_of(name)
    for group in groups_of(analysis, "conv"):
        (reader,) = consumer_weights(analysis.traced_graph, group)
        (seen,) = found.moments[group.id].consumers[0]
        (output,) = tensor_values(analyzed_bytes(name), [str(reader.node.outputs[0].name)], feeds)
        flat = np.moveaxis(output, 1, -1).reshape(-1, reader.width)
        assert seen.count == len(flat)
        weight = reader.matrix(analysis.traced_graph)
        energy = np.einsum("id,ij,jd->d", weight, seen.moment, weight)
        np.testing.assert_allclose(energy, ((flat - flat.mean(0)) ** 2).sum(0), rtol=1e-3)
        bias = flat.mean(0) - seen.means[0] @ weight
        held = existing_bias(reader.node, reader.width)
        expected = held.const_value.numpy() if held is not None and held.const_value is not None else np.zeros(1)
        np.testing.assert_allclose(bias, np.broadcast_to(expected, bias.shape), atol=1e-4 * np.abs(flat).max())


# -- rotary pairs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama__ts17", "llama__dyn20_sdpa"])
def test_predicted_loss_of_rotary_pairs(name: str) -> None:
    """What the query heads of each key head lose in their scores when its pairs go, sample by sample."""
    analysis, feeds = analysis_of(name), random_feeds(name, 5)
    group = groups_of(analysis, "qk")[0]
    assert group.freedom != "basis"
    statistics = snpc.measure_statistics(analysis, calibration_of(analysis, feeds, 2), [group])
    found = snpc.solve_closed_forms(analysis, statistics, [group])
    assert found.kinds == {group.id: "score_selection"}
    curve, selections = found.loss_curve(group), found.elimination_orders[group.id]
    assert curve is not None
    assert len(selections) == group.blocks == 2
    (product,) = score_products(analysis.traced_graph, group)
    operands = tensor_values(analyzed_bytes(name), [product.left.name, product.right.name], feeds)
    units = next(p.units for p in group.probes if p.tensor == product.left.name)
    units = np.broadcast_to(units, (1, operands[0].shape[1], 1, operands[0].shape[3]))[0, :, 0] % group.size
    per_key_head = operands[0].shape[1] // group.blocks
    assert per_key_head == 2

    def lost(block: int, pairs: Sequence[int]) -> float:
        """The squared change of the scores of one key head's query heads, less what all keys have in common."""
        total = 0.0
        for head in range(block * per_key_head, (block + 1) * per_key_head):
            mine = np.isin(units[head], pairs)
            scores = operands[0][:, head][..., mine] @ operands[1][:, head][..., mine, :]
            total += float(np.sum((scores - scores.mean(-1, keepdims=True)) ** 2))
        return total

    gone = [selection.order for selection in selections]
    for kept in range(group.size):
        measured = sum(lost(block, order[: group.size - kept]) for block, order in enumerate(gone))
        assert measured == pytest.approx(curve[kept], rel=1e-2)
    # no other single pair of a head, and no other two, lose less than those that go first
    for block, order in enumerate(gone):
        for count in (1, 2):
            least = min(lost(block, others) for others in combinations(range(group.size), count))
            assert least >= lost(block, order[:count]) * (0.999 if count == 1 else 0.7)


def test_padded_tokens_do_not_count_among_rotary_pairs() -> None:
    """Other ids where nobody looks: the same statistics."""
    name = "llama__ts17"
    analysis, feeds = analysis_of(name), dict(feeds_of(name))
    group = groups_of(analysis, "qk")[0]
    hidden = feeds["attention_mask"] == 0
    assert hidden.any()
    other = {**feeds, "input_ids": np.where(hidden, 7, feeds["input_ids"])}
    sums = [
        snpc.measure_statistics(analysis, calibration_of(analysis, f), [group]).sums[group.id]["score_loss:query"]
        for f in (feeds, other)
    ]
    assert np.abs(sums[0] - sums[1]).max() < 1e-5 * np.abs(sums[0]).max()
