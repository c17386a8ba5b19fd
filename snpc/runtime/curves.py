"""How much the model's outputs mind the width of each group: measured at a few widths, one group at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx_ir as ir

from snpc.passes.edit import existing_bias
from snpc.passes.mask import removed_positions
from snpc.passes.plan import Plan, cuts_of
from snpc.passes.slice import dead_units
from snpc.runtime.calibration import Calibration
from snpc.runtime.fit import Compression, edits_for
from snpc.runtime.model_io import clean, save
from snpc.runtime.session import open_session
from snpc.types import AnyArray, FloatArray, Group

PROBED_SHARES = (0.9, 0.75, 0.5, 0.25)  # kept of a group's units to see how much the outputs move


def output_curves(
    compression: Compression, calibration: Calibration, groups: Sequence[Group], *, provider: str = "cpu"
) -> dict[str, FloatArray]:
    """group id -> [size + 1]: relative squared change of the model's outputs when so many units per block are kept.

    Measured at a few widths, one group at a time, with silenced weights instead of sliced ones; in between, the
    closed-form loss gives the shape. All these weights are inputs of one session, so that a width costs one small pass.
    """
    mine = [g for g in groups if g.id in compression.forms]
    graph = compression.analysis.traced.model.graph
    names = sorted({n for g in mine for n in trial(compression, g, max(1, g.size - 1))})
    plain = {name: constant_array(graph.initializers[name]) for name in names}
    found: dict[str, FloatArray] = {}
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        path = Path(folder) / "probed.onnx"
        save(clean(open_weights(compression.analysis.traced.model, names)), path)
        session = open_session(path, provider=provider, optimise="basic")
        known = {i.name for i in session.get_inputs()}
        outputs = [o.name for o in session.get_outputs()]
        feeds = {k: v for k, v in next(iter(calibration.batches())).items() if k in known}
        dense = session.run(outputs, {**feeds, **plain})
        for group in mine:
            widths = sorted({max(1, round(group.size * share)) for share in PROBED_SHARES} - {group.size})
            moved = {w: session.run(outputs, {**feeds, **plain, **trial(compression, group, w)}) for w in widths}
            curve = compression.curve(group)
            assert curve is not None
            found[group.id] = calibrated(curve, {w: relative_change(dense, m) for w, m in moved.items()})
    return found


def calibrated(curve: FloatArray, measured: Mapping[int, float]) -> FloatArray:
    """The loss curve scaled so that it passes through the measured points; the scale is interpolated between them."""
    widths = np.array(sorted(measured))
    floor = 1e-12 * max(float(curve[0]), 1e-300)
    scales = np.array([measured[w] / max(float(curve[w]), floor) for w in widths])
    scaled = curve * np.exp(np.interp(np.arange(len(curve)), widths, np.log(np.maximum(scales, 1e-300))))
    rising: FloatArray = np.maximum.accumulate(scaled[::-1])[::-1]
    return rising


def relative_change(dense: Sequence[AnyArray], moved: Sequence[AnyArray]) -> float:
    """Mean over outputs of |moved - dense|^2 / |dense|^2."""
    ratios = []
    for a, b in zip(dense, moved, strict=True):
        gap = np.asarray(a, np.float64) - np.asarray(b, np.float64)
        ratios.append(float(np.sum(gap**2) / max(np.sum(np.asarray(a, np.float64) ** 2), 1e-300)))
    return float(np.mean(ratios))


def trial(compression: Compression, group: Group, width: int) -> dict[str, AnyArray]:
    """Weights with this group cut to ``width`` in closed form, and what was cut silent: constant name -> array."""
    analysis = compression.analysis
    elimination = compression.eliminations.get(group.id)
    if elimination is not None:
        rows: tuple[tuple[int, ...], ...] = (tuple(sorted(int(k) for k in elimination.order[group.size - width :])),)
    else:
        rows = tuple(tuple(range(width)) for _ in range(group.blocks))
    plan = Plan(analysis, "", {}, {group.id: rows}, "auto")
    edits = edits_for(compression, plan)
    source = analysis.traced
    graph = source.model.graph
    nodes = {n.name: n for n in graph}
    for node, vector in edits.biases.items():
        bias = existing_bias(nodes[node], len(vector))
        if bias is not None:
            edits.changes.setdefault(str(bias.name), []).append(partial(shifted, vector=vector))
    changed = {name: constant_array(graph.initializers[name]).astype(np.float64) for name in edits.changes}
    for name, changes in edits.changes.items():
        for change in changes:
            changed[name] = change(changed[name])
    dead = dead_units(source.trace, source.units, cuts_of(plan))
    for axis, gone in removed_positions(source.trace, dead):
        name = str(axis.constant.name)
        if name in changed:
            np.moveaxis(changed[name], axis.axis, 0)[gone] = 0.0
    return {name: array.astype(constant_array(graph.initializers[name]).dtype) for name, array in changed.items()}


def shifted(array: FloatArray, vector: FloatArray) -> FloatArray:
    return array + vector.reshape(array.shape)


def constant_array(value: ir.Value) -> AnyArray:
    assert value.const_value is not None
    return value.const_value.numpy()


def open_weights(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """A copy of ``model`` in which these constants are inputs."""
    copy = model.clone()
    for name in names:
        value = copy.graph.initializers.pop(name)
        value.const_value = None
        if not value.is_graph_input():
            copy.graph.inputs.append(value)
    return copy
