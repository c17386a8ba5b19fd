"""Closed forms on real graphs: nothing moves at full rank, less moves than by slicing, and what is predicted is true.

Losses are measured by running both models with the tensor in question as an output; nothing is compared with a number
from an earlier run.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import snpc
from snpc.errors import UserError
from snpc.passes.analyze import Analysis
from snpc.passes.weights.attention_operands import score_products
from snpc.passes.weights.closed_form_kinds import closed_form_weights
from snpc.passes.weights.consumers import single_consumer_weight
from snpc.passes.weights.edits import UnsupportedWeightForm, WeightEdits, apply_edits
from snpc.planning.config import Budget
from snpc.planning.plan import SlicePlan
from snpc.runtime.closed_form.fit import ROTATED, apply_basis
from snpc.runtime.evaluation.compare import run_batches
from snpc.runtime.statistics.measure import measure_batches, statistic_requests
from snpc.runtime.statistics.moments import required_statistics
from snpc.types import FloatArray, Group, Role
from tests.closed_forms import (
    ROLES,
    Feeds,
    analyzed_bytes,
    calibration_of,
    closed_forms_of,
    closed_forms_on,
    initializers,
    prunable_of,
    pruned_bytes,
    random_feeds,
    relative_change,
    tensor_values,
    unpadded_feeds,
)
from tests.command_line import invoke
from tests.models.exports import export
from tests.oracle import Array, analysis_at, analysis_of, feeds_of, relative_error, run, written

NAMES = (
    "vit_timm__ts17",
    "vit_timm__dyn20_sdpa",
    "vit_hf__ts17_sdpa",
    "bert__ts17",
    "bert__dyn20_sdpa",
    "gpt2__ts17",
    "swin_timm__ts17",
    "bart__ts17",
    "encdec__ts17",
    "llama__ts17",
    "t5_gated__ts17",
    "albert__ts17",
    "linear_attention__ts17",
)
MEASURED = ("vit_timm__ts17", "bert__ts17", "gpt2__ts17")
# One of each kind of attention and feed-forward layer, for what plans several times.
PLANNED = (
    "vit_timm__dyn20_sdpa",
    "bert__ts17",
    "gpt2__ts17",
    "swin_timm__ts17",
    "llama__ts17",
    "t5_gated__ts17",
    "albert__ts17",
    "linear_attention__ts17",
)


def only(analysis: Analysis, group: Group, kept: int) -> SlicePlan:
    """A plan that keeps the first ``kept`` units of every block of one group, and all of the others."""
    rows = tuple(tuple(range(kept)) for _ in range(group.blocks))
    return SlicePlan(analysis, "by hand", {}, {group.id: rows}, "auto")


# -- which groups ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_every_group_has_a_form_or_a_reason(name: str) -> None:
    found, groups = closed_forms_of(name), prunable_of(analysis_of(name))
    assert set(found.kinds) | set(found.skipped) == {g.id for g in groups}
    assert not set(found.kinds) & set(found.skipped)
    for reason in found.skipped.values():
        assert 10 < len(reason) < 200
        assert "\n" not in reason
    expected = {"qk": "low_rank_qk", "vo": "low_rank_vo", "ffn": "refit"}
    for group in groups:
        form = "score_selection" if group.role == "qk" and group.freedom != "basis" else expected[group.role]
        assert found.kinds.get(group.id, form) == form
        if group.freedom != "basis" and group.role == "vo":
            assert group.id in found.skipped
        curve = found.loss_curve(group)
        assert (curve is None) == (group.id in found.skipped)
        if curve is not None:
            assert curve.shape == (group.size + 1,)
            assert curve[0] > 0
            assert (np.diff(curve) <= 1e-6 * curve[0]).all()
            assert abs(curve[-1]) <= 1e-6 * curve[0]


@pytest.mark.parametrize("name", [n for n in NAMES if not n.startswith("linear_attention")])
def test_attention_without_rotary_tables_is_rotated(name: str) -> None:
    """A packed QKV, a key that is looked at for its shape and a bias that is sliced in the graph are no obstacle."""
    found = closed_forms_of(name)
    missing = {g.id for g in prunable_of(analysis_of(name)) if g.freedom == "basis" and g.id in found.skipped}
    assert not missing


def test_shared_weights_are_fitted_to_all_layers() -> None:
    """Layers of ALBERT share their projections: one fit, on what all of them see."""
    found = closed_forms_of("albert__ts17")
    assert not found.skipped
    assert sorted(found.kinds.values()) == ["low_rank_qk", "low_rank_vo", "refit"]
    ffn = next(g for g in prunable_of(analysis_of("albert__ts17"), "ffn"))
    (seen,) = found.moments[ffn.id].consumers[0]
    tokens = feeds_of("albert__ts17")["input_ids"].size
    assert seen.count == 3 * tokens
    assert len(seen.means) == 3


# -- nothing moves at full rank --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_change_of_basis_alone_changes_nothing(name: str) -> None:
    found, analysis, edits = closed_forms_of(name), analysis_of(name), WeightEdits()
    rotated = [g for g in prunable_of(analysis) if found.kinds.get(g.id) in ROTATED]
    for group in rotated:
        apply_basis(edits, found, group)
    model = written(apply_edits(analysis.traced_graph, edits))
    assert relative_error(run(export(name), feeds_of(name)), run(model, feeds_of(name))) < 1e-4
    weights = [
        {t.name: numpy_helper.to_array(t) for t in proto.graph.initializer}
        for proto in (onnx.load(export(name)), onnx.load_from_string(model))
    ]
    changed = [n for n, w in weights[1].items() if n in weights[0] and not np.array_equal(w, weights[0][n])]
    assert len(changed) >= len(rotated)  # a packed QKV is one weight for two groups


@pytest.mark.parametrize("name", NAMES)
def test_a_plan_that_keeps_everything_changes_nothing(name: str) -> None:
    """All rotated, all refitted, nothing cut; and means that go into biases are nil."""
    found, analysis = closed_forms_of(name), analysis_of(name)
    keep = {g.id: tuple(tuple(range(g.size)) for _ in range(g.blocks)) for g in prunable_of(analysis)}
    model = pruned_bytes(snpc.PruningPlan(SlicePlan(analysis, "by hand", {}, keep, "auto"), found))
    assert relative_error(run(export(name), feeds_of(name)), run(model, feeds_of(name))) < 1e-4


# -- what is predicted is true ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_predicted_loss_of_scores(name: str, share: float) -> None:
    """On one sample, since keys are paired with the queries of all samples. Softmax ignores each query's mean."""
    analysis, feeds = analysis_of(name), random_feeds(name, 1)
    for group in prunable_of(analysis, "qk"):
        found = closed_forms_on(name, feeds, [group])
        kept = round(group.size * share)
        model = pruned_bytes(snpc.PruningPlan(only(analysis, group, kept), found))
        (product,) = score_products(analysis.traced_graph, group)
        scores = product.node.outputs[0]
        after, scale = next(iter(scores.consumers())), 1.0
        if after.op_type == "Mul":  # by 1/sqrt(head width), which the cut changes
            constant = next(v.const_value for v in after.inputs if v is not None and v.const_value is not None)
            scores, scale = after.outputs[0], float(constant.numpy().reshape(-1)[0])
        (before,) = tensor_values(analyzed_bytes(name), [str(scores.name)], feeds)
        (now,) = tensor_values(model, [str(scores.name)], feeds)
        gap = now - before
        measured = float(np.sum((gap - gap.mean(-1, keepdims=True)) ** 2)) / scale**2
        curve = found.loss_curve(group)
        assert curve is not None
        assert measured == pytest.approx(curve[kept], rel=1e-2, abs=1e-7 * curve[0])
        assert share > 0.5 or measured > 1e-4 * curve[0]  # 11 tokens span 10 dimensions


@pytest.mark.parametrize("name", [*MEASURED, "vit_timm__dyn20_sdpa", "swin_timm__ts17"])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_predicted_loss_of_values(name: str, share: float) -> None:
    """Head by head, as it is minimised: what a head adds to the output, less what the bias makes up for."""
    analysis, feeds, found = analysis_of(name), unpadded_feeds(name), closed_forms_of(name)
    for group in prunable_of(analysis, "vo")[:2]:
        kept = round(group.size * share)
        model = pruned_bytes(snpc.PruningPlan(only(analysis, group, kept), found))
        reader = single_consumer_weight(analysis.traced_graph, group)
        context = next(p.tensor for p in group.probes if p.kind == "context")
        sums = []
        for proto, width in ((analyzed_bytes(name), group.size), (model, kept)):
            weights = {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(proto).graph.initializer}
            (rows,) = tensor_values(proto, [context], feeds)
            split = rows.reshape(-1, group.blocks, width)
            weight = np.moveaxis(weights[reader.weight_slice.tensor].astype(np.float64), reader.weight_slice.axis, 0)
            sums.append(np.einsum("rbd,bde->rbe", split, weight.reshape(group.blocks, width, -1)))
        gap = sums[1] - sums[0]
        measured = float(np.sum((gap - gap.mean(0)) ** 2))
        curve = found.loss_curve(group)
        assert curve is not None
        assert measured == pytest.approx(curve[kept], rel=1e-2)
        assert measured > 1e-4 * curve[0]


@pytest.mark.parametrize("name", MEASURED)
@pytest.mark.parametrize("kept", [4, 12, 40])
def test_predicted_loss_of_hidden_units(name: str, kept: int) -> None:
    """More rows than units, else nothing is lost that damping does not hide."""
    analysis, feeds = analysis_of(name), random_feeds(name, 48)
    for group in prunable_of(analysis, "ffn"):
        found = closed_forms_on(name, feeds, [group], 48)  # one batch: the ridge of a rule
        keep = tuple(sorted(found.elimination_orders[group.id][0].order[group.size - kept :].tolist()))
        plan = replace(only(analysis, group, kept), keep={group.id: (keep,)})
        # the output of the matrix, and of the bias that takes the means up
        outputs = biased_output(analysis, group)
        (before,) = tensor_values(analyzed_bytes(name), [outputs], feeds)
        (now,) = tensor_values(pruned_bytes(snpc.PruningPlan(plan, found)), [outputs], feeds)
        measured = float(np.sum((now - before) ** 2))
        curve = found.loss_curve(group)
        assert curve is not None
        assert curve[kept] > 1e-3 * curve[0]
        assert measured == pytest.approx(curve[kept], rel=1e-2 + interpolated(group, kept))
        assert measured <= curve[kept] * (1 + 1e-3)


def interpolated(group: Group, kept: int) -> float:
    """Losses are exact where scores were refreshed, and read off a line between."""
    batch = -(-group.size // 48)
    return 0.0 if (group.size - kept) % batch == 0 else 0.1


def biased_output(analysis: Analysis, group: Group) -> str:
    node = single_consumer_weight(analysis.traced_graph, group).node
    users = list(node.outputs[0].consumers())
    if len(users) == 1 and users[0].op_type == "Add" and any(v is not None and v.const_value for v in users[0].inputs):
        return str(users[0].outputs[0].name)
    return str(node.outputs[0].name)


@pytest.mark.parametrize("name", [*MEASURED, "llama__ts17", "t5_gated__ts17"])
@pytest.mark.parametrize("role", ["vo", "ffn"])
def test_the_mean_of_the_output_stays(name: str, role: Role) -> None:
    """What is cut loses its mean, and a bias takes it up: an own one, or a new one where there was none."""
    analysis, feeds, found = analysis_of(name), unpadded_feeds(name), closed_forms_of(name)
    group = prunable_of(analysis, role)[0]
    kept = group.size // 4
    plan = only(analysis, group, kept)
    if role == "ffn":
        keep = tuple(sorted(found.elimination_orders[group.id][0].order[group.size - kept :].tolist()))
        plan = replace(plan, keep={group.id: (keep,)})
    model = pruned_bytes(snpc.PruningPlan(plan, found))
    output = biased_output(analysis, group)
    (before,) = tensor_values(analyzed_bytes(name), [output], feeds)
    new = f"{output}__biased"
    names = {o for n in onnx.load_from_string(model).graph.node for o in n.output}
    assert (new in names) == (name in ("llama__ts17", "t5_gated__ts17"))
    (now,) = tensor_values(model, [new if new in names else output], feeds)
    sliced = pruned_bytes(snpc.PruningPlan(replace(plan, method="select")))
    (plain,) = tensor_values(sliced, [output], feeds)
    axes = tuple(range(before.ndim - 1))
    spread = float(np.sqrt(np.mean(before**2)))
    off, sliced_off = (np.abs(before.mean(axes) - other.mean(axes)).max() for other in (now, plain))
    assert sliced_off > 1e-3 * spread
    assert off < 1e-5 * spread


# -- statistics ------------------------------------------------------------------------------------------------------


def statistics(name: str, feeds: Feeds, batch: int) -> dict[str, FloatArray]:
    analysis, found = analysis_of(name), closed_forms_of(name)
    wanted = statistic_requests(
        analysis,
        {g.id: required_statistics(analysis.weights[g.id]) for g in prunable_of(analysis) if g.id in found.kinds},
    )
    assert wanted
    sums: dict[str, FloatArray] = {}
    for result in measure_batches(analysis, wanted, calibration_of(analysis, feeds, batch).batches()):
        for item in wanted:
            key = f"{item.group.id} {str(item.key).removesuffix('#0.0')}"
            sums[key] = sums.get(key, 0.0) + result[item.output]
    return sums


def agree(found: FloatArray, expected: FloatArray) -> bool:
    return bool(np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", NAMES)
def test_statistics_do_not_depend_on_batches(name: str) -> None:
    feeds = feeds_of(name)
    whole = statistics(name, feeds, 3)
    single = statistics(name, feeds, 1)
    first = statistics(name, {k: v[:2] for k, v in feeds.items()}, 2)
    last = statistics(name, {k: v[2:] for k, v in feeds.items()}, 2)
    assert whole.keys() == single.keys() == first.keys()
    for key, value in whole.items():
        assert np.isfinite(value).all()
        assert agree(single[key], value), key
        assert agree(first[key] + last[key], value), key
        assert not agree(first[key], value), key


@pytest.mark.parametrize("name", MEASURED)
def test_moments_are_those_of_the_activations(name: str) -> None:
    analysis, feeds = analysis_of(name), unpadded_feeds(name)
    sums = statistics(name, feeds, 3)
    for group in prunable_of(analysis, "vo", "ffn"):
        kind = "context" if group.role == "vo" else "hidden"
        tensor = next(p.tensor for p in group.probes if p.kind == kind)
        (rows,) = tensor_values(analyzed_bytes(name), [tensor], feeds)
        split = rows.reshape(-1, group.blocks, group.size)
        name_of = "gram_per_repeat" if group.role == "vo" else "gram_joint"
        total = sums[f"{group.id} {name_of}:{kind}"].reshape(group.blocks, group.size + 1, group.size + 1)
        assert agree(total[:, :-1, :-1], np.einsum("rbi,rbj->bij", split, split))
        assert agree(total[:, -1, :-1], split.sum(0))
        assert (total[:, -1, -1] == len(split)).all()
    for group in prunable_of(analysis, "qk"):
        (product,) = score_products(analysis.traced_graph, group)
        node = product.node
        query, key = tensor_values(analyzed_bytes(name), [str(v.name) for v in node.inputs if v is not None], feeds)
        centred = key - key.mean(-1, keepdims=True)  # [batch, heads, width, tokens]
        assert agree(sums[f"{group.id} moment:query"], np.einsum("nbti,nbtj->bij", query, query))
        assert agree(sums[f"{group.id} gram_centered:key"], np.einsum("nbit,nbjt->bij", centred, centred))


# -- better than slicing ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PLANNED)
def test_less_moves_than_by_slicing(name: str) -> None:
    analysis, feeds = analysis_of(name), feeds_of(name)
    data, before = calibration_of(analysis, feeds), run(export(name), feeds)
    for role in ROLES:
        groups = prunable_of(analysis, role)
        if not groups:
            continue
        choice = Budget(0.5, (role,))
        auto = relative_change(before, run(pruned_bytes(snpc.plan(analysis, choice, calibration=data)), feeds))
        plain = snpc.plan(analysis, choice, calibration=data, method="select", criterion="magnitude")
        fitted = all(closed_forms_of(name).kinds.get(g.id, "score_selection") != "score_selection" for g in groups)
        # where nothing can be fitted, activations still choose better than weights do
        assert auto < (0.6 if fitted else 0.95) * relative_change(before, run(pruned_bytes(plain), feeds)), role


@pytest.mark.parametrize("name", ["vit_timm__dyn20_sdpa", "bert__ts17", "gpt2__ts17", "llama__ts17"])
@pytest.mark.slow
def test_less_moves_on_data_not_seen_before(name: str) -> None:
    analysis, feeds = analysis_of(name), feeds_of(name)
    data, before = calibration_of(analysis, random_feeds(name, 24), 8), run(export(name), feeds)
    for role in {g.role for g in prunable_of(analysis) if g.id in closed_forms_of(name).kinds}:
        choice = Budget(0.5, (role,))
        auto = relative_change(before, run(pruned_bytes(snpc.plan(analysis, choice, calibration=data)), feeds))
        plain = snpc.plan(analysis, choice, calibration=data, method="select", criterion="magnitude")
        assert auto < relative_change(before, run(pruned_bytes(plain), feeds)), role


# -- from end to end -------------------------------------------------------------------------------------------------


def nodes_of(path: Path) -> list[onnx.NodeProto]:
    nodes = list(onnx.load(path).graph.node)
    assert len({n.name for n in nodes}) == len(nodes)
    outputs = [o for n in nodes for o in n.output if o]
    assert len(set(outputs)) == len(outputs)
    return nodes


@pytest.mark.parametrize("name", PLANNED)
@pytest.mark.slow
def test_pruned_and_verified(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name)
    data = calibration_of(analysis, feeds_of(name))
    made = snpc.plan(analysis, Budget(0.5), calibration=data)
    target = tmp_path / "pruned.onnx"
    result = snpc.apply(made, target)
    assert result.verification.max_abs_diff is not None  # sliced was compared with masked, of the refitted weights
    assert {"same inputs and outputs", "onnx.checker and strict shape inference"} <= set(result.verification.structure)
    assert result.after.params < result.before.params
    assert result.after.macs < result.before.macs
    assert result.plan.method == "auto"
    assert dict(result.closed_forms) == dict(closed_forms_of(name).kinds)
    added = [n for n in nodes_of(target) if n.name.endswith("__bias")]
    biasless = {"llama__ts17": 4, "t5_gated__ts17": 10}
    assert len(added) == biasless.get(name, 0)
    report = snpc.json_report(result)
    assert report["method"] == "auto"
    for entry in report["groups"]:
        rotated = entry["form"] in ("scores", "values")
        assert not (rotated and any("keep" in site for site in entry["sites"]))
    plain = pruned_bytes(snpc.plan(analysis, Budget(0.5), calibration=data, method="select", criterion="magnitude"))
    before, feeds = run(export(name), feeds_of(name)), feeds_of(name)
    assert 0 < relative_change(before, run(target, feeds)) < 0.7 * relative_change(before, run(plain, feeds))


@pytest.mark.slow
def test_pruned_twice(tmp_path: Path) -> None:
    """The second time, the bias that the first one made takes the means up."""
    path, feeds = export("llama__ts17"), feeds_of("llama__ts17")
    counts = []
    for turn in range(2):
        analysis = snpc.analyze(snpc.load(path))
        data = calibration_of(analysis, feeds)
        made = snpc.plan(analysis, Budget(0.5, ("vo", "ffn")), calibration=data)
        path = tmp_path / f"{turn}.onnx"
        snpc.apply(made, path)
        counts.append(sum(n.name.endswith("__bias") for n in nodes_of(path)))
    assert counts == [4, 4]


@pytest.mark.parametrize("name", ["vit_timm__dyn20_sdpa", "bert__ts17", "llama__ts17"])
@pytest.mark.slow
def test_a_plan_from_a_file_makes_the_same_weights(name: str, tmp_path: Path) -> None:
    analysis = analysis_of(name)
    data = calibration_of(analysis, feeds_of(name))
    made = snpc.plan(analysis, Budget(0.5), calibration=data)
    snpc.apply(made, tmp_path / "at-once.onnx")

    read = snpc.plan_from_json(snpc.plan_to_json(made.slices), analysis, "the plan")
    assert read.method == "auto"
    assert dict(read.keep) == dict(made.slices.keep)
    again = snpc.complete_plan(read, data)
    assert again.closed_forms is not None
    snpc.apply(again, tmp_path / "later.onnx")
    one, two = initializers(tmp_path / "at-once.onnx"), initializers(tmp_path / "later.onnx")
    assert one.keys() == two.keys()
    for key, value in one.items():
        np.testing.assert_array_equal(two[key], value, err_msg=key)


def test_a_plan_that_refits_needs_its_data(tmp_path: Path) -> None:
    name = "bert__ts17"
    analysis = analysis_of(name)
    made = snpc.plan(analysis, Budget(0.5), calibration=calibration_of(analysis, feeds_of(name)))
    with pytest.raises(UserError, match="--calib"):
        snpc.complete_plan(made.slices)
    with pytest.raises(UserError, match="calibration data"):
        snpc.apply(snpc.PruningPlan(made.slices), tmp_path / "pruned.onnx")
    with pytest.raises(UserError, match="--calib"):
        snpc.plan(analysis, Budget(0.5), method="auto")
    plan = tmp_path / "plan.json"
    plan.write_text(snpc.plan_to_json(made.slices))
    refused = invoke("apply", export(name), plan, "-o", tmp_path / "pruned.onnx", code=2)
    assert "--calib" in refused.stderr.splitlines()[-1]
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
    select = snpc.plan(analysis, Budget(0.5)).slices
    assert select.method == "select"
    assert snpc.complete_plan(select).closed_forms is None


HALVES = {TensorProto.FLOAT16: np.dtype(np.float16), TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16)}


def halved(path: Path, target: Path, kind: int) -> Path:
    """The model in float16 or bfloat16, as converters write it: weights, inputs and outputs, and what is cast."""
    dtype = HALVES[kind]
    proto = onnx.load(path)
    graph = proto.graph
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(dtype), tensor.name))
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type == TensorProto.FLOAT:
            value.type.tensor_type.elem_type = kind
    del graph.value_info[:]
    for attribute in (a for node in graph.node for a in node.attribute):
        if attribute.name == "to" and attribute.i == TensorProto.FLOAT:
            attribute.i = kind
        if attribute.type == onnx.AttributeProto.TENSOR and attribute.t.data_type == TensorProto.FLOAT:
            attribute.t.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(attribute.t).astype(dtype)))
    onnx.save(proto, target)
    return target


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("vit_timm__ts17", TensorProto.FLOAT16),
        ("vit_hf__ts17_sdpa", TensorProto.FLOAT16),
        ("bert__ts17", TensorProto.BFLOAT16),  # a convolution takes bfloat16 since opset 22 only
        ("gpt2__ts17", TensorProto.BFLOAT16),
    ],
)
@pytest.mark.slow
def test_half_precision_stays_half_precision(name: str, kind: int, tmp_path: Path) -> None:
    """Algebra in float64, weights in their own type, and what is written is verified."""
    path = halved(export(name), tmp_path / "half.onnx", kind)
    feeds = {k: v.astype(HALVES[kind]) if v.dtype.kind == "f" else v for k, v in feeds_of(name).items()}
    analysis = snpc.analyze(snpc.load(path))
    data = calibration_of(analysis, feeds)
    made = snpc.plan(analysis, Budget(0.5), calibration=data)
    assert made.closed_forms is not None
    assert dict(made.closed_forms.kinds) == dict(closed_forms_of(name).kinds)
    result = snpc.apply(made, tmp_path / "pruned.onnx")
    assert result.verification.max_abs_diff is not None
    kinds = {w.dtype for w in initializers(result.path).values() if w.dtype.kind in "fV"}
    assert kinds == {HALVES[kind]}
    dense, outputs = (run_batches(p, [feeds])[0].values() for p in (path, result.path))
    assert all(np.isfinite(o).all() for o in outputs)
    plain = snpc.plan(analysis, Budget(0.5), calibration=data, method="select", criterion="magnitude")
    snpc.apply(plain, tmp_path / "plain.onnx")
    sliced = run_batches(tmp_path / "plain.onnx", [feeds])[0].values()
    assert relative_change([*dense], [*outputs]) < 0.6 * relative_change([*dense], [*sliced])


# -- forms that a graph can have and an export seldom has ------------------------------------------------------------

WIDTH, HIDDEN = 8, 24
Weights = dict[str, Array]


def normal(*shape: int, seed: int = 0, offset: float = 0.0) -> Array:
    return (np.random.default_rng((seed, *shape)).normal(size=shape) * 0.6 + offset).astype(np.float32)


def graph(folder: Path, nodes: Sequence[onnx.NodeProto], weights: Weights, shape: Sequence[int | str]) -> Analysis:
    """A model from ``x`` to ``y``, both of this shape."""
    ends = [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(shape)) for n in ("x", "y")]
    constants = [numpy_helper.from_array(a, n) for n, a in weights.items()]
    made = helper.make_graph(list(nodes), "g", ends[:1], ends[1:], constants)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.checker.check_model(model, full_check=True)
    return analysis_at(folder / "m.onnx", model)


def mlp(*last: onnx.NodeProto, hidden: str = "r") -> list[onnx.NodeProto]:
    up = [helper.make_node("MatMul", ["x", "up"], ["u"]), helper.make_node("Relu", ["u"], [hidden])]
    return [*up, *last]


MLP: Weights = {"up": normal(WIDTH, HIDDEN), "down": normal(HIDDEN, WIDTH, offset=0.2), "c": normal(WIDTH)}
READERS: dict[str, tuple[list[onnx.NodeProto], int]] = {
    "output": (mlp(helper.make_node("MatMul", ["r", "down"], ["y"])), 1),
    "add": (mlp(helper.make_node("MatMul", ["r", "down"], ["d"]), helper.make_node("Add", ["c", "d"], ["y"])), 0),
    "sub": (mlp(helper.make_node("MatMul", ["r", "down"], ["d"]), helper.make_node("Sub", ["d", "c"], ["y"])), 1),
    "from": (mlp(helper.make_node("MatMul", ["r", "down"], ["d"]), helper.make_node("Sub", ["c", "d"], ["y"])), 1),
    "turned": (
        mlp(
            helper.make_node("Transpose", ["turned"], ["w"], perm=[1, 0]),
            helper.make_node("MatMul", ["r", "w"], ["y"]),
        ),
        1,
    ),
    "einsum": (mlp(helper.make_node("Einsum", ["r", "down"], ["y"], equation="btf,fd->btd")), 1),
}


@pytest.mark.parametrize("kind", READERS)
def test_means_find_their_way_into_any_bias(kind: str, tmp_path: Path) -> None:
    nodes, added = READERS[kind]
    weights = MLP | ({"turned": MLP["down"].T.copy()} if kind == "turned" else {})
    used = {name for node in nodes for name in node.input}
    analysis = graph(tmp_path, nodes, {n: w for n, w in weights.items() if n in used}, ["batch", "tokens", WIDTH])
    feeds = {"x": normal(6, 10, WIDTH, seed=1)}
    data = calibration_of(analysis, feeds, 6)
    made = snpc.plan(analysis, Budget(0.5, ("ffn",)), calibration=data)
    assert made.closed_forms is not None
    assert list(made.closed_forms.kinds.values()) == ["refit"]
    result = snpc.apply(made, tmp_path / "p.onnx")
    assert len(nodes_of(result.path)) - len(nodes) == added
    (before,), (now,) = run(analysis.model.path, feeds), run(result.path, feeds)
    assert np.abs(before.mean((0, 1)) - now.mean((0, 1))).max() < 1e-5 * np.abs(before).max()
    rows = sum(
        w.shape == (HIDDEN // 2, WIDTH) or w.shape == (WIDTH, HIDDEN // 2) for w in initializers(result.path).values()
    )
    assert rows == 2


ATTENTION: Weights = {name: normal(WIDTH, WIDTH, seed=k) for k, name in enumerate(("q", "k", "v", "o"))}
REFUSED: dict[str, list[onnx.NodeProto]] = {
    "gemm that scales": mlp(helper.make_node("Gemm", ["r", "down", "c"], ["y"], alpha=0.5)),
    "gemm that scales its bias": mlp(helper.make_node("Gemm", ["r", "down", "c"], ["y"], beta=0.5)),
    "outputs along the first axis": [
        helper.make_node("MatMul", ["square_up", "x"], ["u"]),
        helper.make_node("Relu", ["u"], ["r"]),
        helper.make_node("MatMul", ["square_down", "r"], ["y"]),
    ],
}


@pytest.mark.parametrize("kind", REFUSED)
def test_readers_that_are_left_as_they_are(kind: str, tmp_path: Path) -> None:
    """Their units are selected, and the model that comes out is verified like any other."""
    nodes = REFUSED[kind]
    weights = MLP | {"square_up": MLP["up"].T.copy(), "square_down": MLP["down"].T.copy()}
    used = {name for node in nodes for name in node.input}
    analysis = graph(tmp_path, nodes, {n: w for n, w in weights.items() if n in used}, [WIDTH, WIDTH])
    data = calibration_of(analysis, {"x": normal(WIDTH, WIDTH, seed=1)}, WIDTH)
    made = snpc.plan(analysis, Budget(0.5, ("ffn",)), calibration=data)
    assert made.closed_forms is not None
    assert not made.closed_forms.kinds
    assert all("its consumer" in reason for reason in made.closed_forms.skipped.values())
    result = snpc.apply(made, tmp_path / "p.onnx")
    assert result.after.params < result.before.params


def attention(scores: Sequence[onnx.NodeProto], values: Sequence[onnx.NodeProto]) -> list[onnx.NodeProto]:
    return [
        *scores,
        helper.make_node("Softmax", ["s"], ["p"], axis=-1),
        *values,
        helper.make_node("MatMul", ["context", "o"], ["y"]),
    ]


def product(weight: str) -> onnx.NodeProto:
    return helper.make_node("MatMul", ["x", weight], [f"x{weight}"])


def scores_of(left: str, right: str) -> onnx.NodeProto:
    return helper.make_node("Einsum", [left, right], ["s"], equation="bqd,bkd->bqk")


PLAIN_SCORES = [product("q"), product("k"), scores_of("xq", "xk")]
PLAIN_VALUES = [product("v"), helper.make_node("MatMul", ["p", "xv"], ["context"])]
ODD: dict[str, tuple[list[onnx.NodeProto], Callable[[Group], bool], str]] = {
    "queries are keys": (
        attention([product("q"), scores_of("xq", "xq")], PLAIN_VALUES),
        lambda g: g.role == "qk",
        "both sides|has other consumers",
    ),
    "keys are values": (
        attention(PLAIN_SCORES, [helper.make_node("MatMul", ["p", "xk"], ["context"])]),
        lambda g: any(s.tensor == "k" for s in g.sites),
        "has other consumers",
    ),
    "a vector on the context": (
        attention(
            PLAIN_SCORES,
            [
                product("v"),
                helper.make_node("MatMul", ["p", "xv"], ["pv"]),
                helper.make_node("Add", ["pv", "c"], ["context"]),
            ],
        ),
        lambda g: g.role == "vo",
        "applies to it as well",
    ),
    "values of two tokens only": (
        [
            *attention(
                PLAIN_SCORES,
                [
                    product("v"),
                    helper.make_node("Split", ["xv", "halves"], ["first", "second"], axis=1),
                    helper.make_node("MatMul", ["p", "xv"], ["context_all"]),
                    helper.make_node("Add", ["context_all", "first"], ["context"]),
                ],
            )
        ],
        lambda g: g.role == "vo",
        "has other consumers|normalisation|nonlinear",
    ),
}


@pytest.mark.parametrize("kind", ODD)
def test_attention_that_cannot_be_rotated(kind: str, tmp_path: Path) -> None:
    nodes, mine, words = ODD[kind]
    weights = ATTENTION | {"c": normal(WIDTH), "halves": np.array([1, 5], np.int64)}
    used = {name for node in nodes for name in node.input}
    analysis = graph(tmp_path, nodes, {n: w for n, w in weights.items() if n in used}, ["batch", 6, WIDTH])
    groups = [g for g in analysis.groups if mine(g) and g.prunable and g.role in ROLES]
    assert groups
    for group in groups:
        with pytest.raises(UnsupportedWeightForm, match=words):
            closed_form_weights(analysis.traced_graph, group)
        assert analysis.weights[group.id].kind is None
    data = calibration_of(analysis, {"x": normal(5, 6, WIDTH, seed=1)}, 5)
    made = snpc.plan(analysis, Budget(0.5), calibration=data)
    result = snpc.apply(made, tmp_path / "p.onnx")
    assert result.after.params < result.before.params


def test_plain_attention_is_rotated(tmp_path: Path) -> None:
    """What the odd ones are compared with."""
    analysis = graph(tmp_path, attention(PLAIN_SCORES, PLAIN_VALUES), ATTENTION, ["batch", 6, WIDTH])
    assert {g.role: analysis.weights[g.id].kind for g in analysis.groups if g.prunable} == {
        "qk": "low_rank_qk",
        "vo": "low_rank_vo",
    }
