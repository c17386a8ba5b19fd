"""Calibration data, closed forms and measures of change for exports."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

import snpc
from snpc.passes.analyze import Analysis
from snpc.passes.slicing.rewrite import rewrite_model
from snpc.planning.plan import PruningMethod, cuts_of
from snpc.runtime.calibration import Calibration
from snpc.runtime.closed_form.fit import ClosedForms, fit_parallel, in_rotated_order
from snpc.runtime.execution.execution import Execution
from snpc.runtime.statistics.statistics import Statistics
from snpc.types import FloatArray, Group, Role
from tests.models.exports import VOCABULARY
from tests.oracle import Array, analysis_of, feeds_of, run, written

ROLES: tuple[Role, ...] = ("qk", "vo", "ffn")
Feeds = dict[str, Array]


def calibration_of(analysis: Analysis, feeds: Feeds, batch: int = 3) -> Calibration:
    """The feeds as calibration data, ``batch`` samples at a time, none of them held out."""
    return snpc.load_calibration(feeds, analysis.model.inputs, batch=batch, held_out=0)


def prunable_of(analysis: Analysis, *roles: Role) -> list[Group]:
    """The prunable groups of these roles; of query/key, value/output and feed-forward widths by default."""
    return [g for g in analysis.groups if g.role in (roles or ROLES) and g.prunable]


def closed_forms_on(name: str, feeds: Feeds, groups: Sequence[Group], batch: int = 3) -> ClosedForms:
    analysis = analysis_of(name)
    statistics = snpc.measure_statistics(analysis, calibration_of(analysis, feeds, batch), groups)
    return snpc.solve_closed_forms(analysis, statistics, groups)


def unpadded_feeds(name: str) -> Feeds:
    """The export's feeds with every token attended to."""
    return {key: np.ones_like(a) if "mask" in key else a for key, a in feeds_of(name).items()}


@functools.cache
def closed_forms_of(name: str) -> ClosedForms:
    """All groups of an export, measured on its feeds, without padding."""
    return closed_forms_on(name, unpadded_feeds(name), prunable_of(analysis_of(name)))


def random_feeds(name: str, samples: int, seed: int = 0) -> Feeds:
    """Other inputs of the kind that the export's feeds are."""
    rng = np.random.default_rng(seed)
    feeds: Feeds = {}
    for key, value in feeds_of(name).items():
        shape = (samples, *value.shape[1:])
        if value.dtype.kind == "f":
            feeds[key] = rng.normal(size=shape).astype(value.dtype)
        elif "mask" in key:
            feeds[key] = np.ones(shape, value.dtype)
        else:
            feeds[key] = rng.integers(0, VOCABULARY if value.max() > 1 else 2, shape).astype(value.dtype)
    return feeds


def pruned_bytes(decision: snpc.PruningPlan) -> bytes:
    """What ``apply_plan`` writes, without verifying it."""
    plan, closed_forms = decision.slices, decision.closed_forms
    if closed_forms is None:
        return written(rewrite_model(plan.analysis.traced_graph, cuts_of(plan)).model)
    plan = in_rotated_order(closed_forms, plan)
    return written(rewrite_model(fit_parallel(closed_forms, plan), cuts_of(plan)).model)


def relative_change(before: Sequence[Array], after: Sequence[Array]) -> float:
    """Root mean square of the change of all outputs, relative to that of the outputs before."""
    change = sum(float(np.sum((a.astype(np.float64) - b) ** 2)) for a, b in zip(before, after, strict=True))
    return float((change / sum(float(np.sum(a.astype(np.float64) ** 2)) for a in before)) ** 0.5)


def analyzed_bytes(name: str) -> bytes:
    """The model as it is analyzed: without the rows that no output depends on."""
    return written(analysis_of(name).traced_graph.model.clone())


def tensor_values(model: bytes, names: Sequence[str], feeds: Feeds) -> list[FloatArray]:
    """The values of inner tensors."""
    proto = onnx.load_from_string(model)
    del proto.graph.output[:]
    proto.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    return [a.astype(np.float64) for a in run(proto.SerializeToString(), feeds)]


def initializers(path: Path) -> dict[str, Array]:
    """The weights of a model file by name."""
    return initializers_of(path.read_bytes())


def initializers_of(model: bytes) -> dict[str, Array]:
    return {t.name: numpy_helper.to_array(t) for t in onnx.load_from_string(model).graph.initializer}


def statistics_of(
    name: str, feeds: dict[str, Array], batch: int, method: PruningMethod = "auto", limit: int | None = None
) -> Statistics:
    """What ``snp`` or the closed forms need of an export's groups, measured on the feeds."""
    analysis = analysis_of(name)
    data = calibration_of(analysis, feeds, batch)
    return snpc.measure_statistics(
        analysis, data, prunable_of(analysis), method=method, criterion="snp", execution=Execution(memory_limit=limit)
    )
