"""Latency that narrower groups save: whole models at a few widths, timed side by side with the dense model.

Times of single products do not add up to the time of a whole model, whose operators a runtime fuses. So all groups of a
role are narrowed in the whole model, to a few widths, and the time saved is divided among the groups by their MACs. The
table is kept in the user's cache directory, by machine, provider, model and sizes.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import platformdirs

from snpc.passes import Analysis
from snpc.passes.canonicalization import finalize
from snpc.passes.slicing import rewrite_model
from snpc.planning import LatencyCurves, SlicePlan, cuts_of
from snpc.runtime.evaluation.bench import TimingProtocol, bench
from snpc.runtime.execution import (
    DEFAULT_EXECUTION,
    Execution,
    RandomInputs,
    available_cores,
    cpu_name,
    id_limits,
    onnxruntime_version,
)
from snpc.runtime.io import atomic_write, save
from snpc.temporary import temporary_folder
from snpc.types import FloatArray, Group, Shape

KEPT_SHARES = (0.75, 0.5, 0.25)  # fractions of units kept, for all groups of a role
LATENCY_CACHE_FORMAT = 2


@dataclass(frozen=True)
class TimedArtifact:
    """An artifact to time in place of a model: ``build`` writes it into a folder. ``name`` identifies the build."""

    name: str
    build: Callable[[Path, Path], Path]


@dataclass(frozen=True)
class Workload:
    """How a latency is measured: inputs, threads and rounds. ``rounds`` and ``seconds`` are minima for each pair of
    models. ``artifact``: both models are built into this first (see ``snpc.timed_artifact``), and that is timed."""

    batch: int = 1
    shapes: Mapping[str, Shape] | None = None
    threads: int = 0
    warmup: int = 2
    rounds: int = 16
    seconds: float = 0.5
    artifact: TimedArtifact | None = None

    def timed_file(self, model: Path, folder: Path) -> Path:
        """The file that is timed for ``model``: the model itself, or its artifact in ``folder``."""
        if self.artifact is None:
            return model
        folder.mkdir(exist_ok=True)
        return self.artifact.build(model, folder)

    def dim_sizes(self, analysis: Analysis) -> dict[str, int]:
        """Sizes of dynamic axes, without the batch and those of ``shapes``: the sizes at which MACs are quoted."""
        inputs = analysis.model.inputs
        dims_of_shapes = {dim for spec in inputs if spec.name in (self.shapes or {}) for dim in spec.shape}
        leading = {spec.shape[0] for spec in inputs if spec.shape}
        inner = {dim for spec in inputs for dim in spec.shape[1:]}
        return {k: v for k, v in analysis.dim_sizes.items() if k in inner - leading - dims_of_shapes}


def time_pair(
    analysis: Analysis, base: Path, other: Path, workload: Workload, execution: Execution = DEFAULT_EXECUTION
) -> tuple[float, float]:
    """(ms of ``base``, time of ``other`` relative to it): medians of interleaved rounds.

    Raises UserError where a model does not run, or ``workload`` does not fit its inputs.
    """
    inputs = RandomInputs(
        batch=workload.batch,
        shapes=workload.shapes,
        dim_sizes=workload.dim_sizes(analysis),
        id_limits=id_limits(analysis),
    )
    result = bench(
        [base, other],
        inputs,
        protocol=TimingProtocol(workload.warmup, workload.rounds, workload.seconds),
        execution=replace(execution, threads=workload.threads or execution.threads),
    )
    return result.timings[0].median, 1 / result.speedups[0].ratio


@dataclass(frozen=True)
class LatencyTable:
    """``dense`` ms of the original, ``base`` ms of the model as it is analyzed (without unused rows), and
    per role the share of ``base`` that is saved when the shares ``KEPT_SHARES`` of its units are kept."""

    dense: float
    base: float
    roles: Mapping[str, tuple[float, ...]]

    def saved_times(self, groups: Sequence[Group], selected: Sequence[Group]) -> LatencyCurves:
        """Times of the groups ``selected``; ``groups`` are all groups that were narrowed for the table."""
        timed = timed_roles(groups)
        macs = {role: sum(g.macs for g in groups if timed[g.id] == role) for role in self.roles}
        saved = {g.id: self.saving_curve(g, timed[g.id]) * g.macs / max(macs[timed[g.id]], 1) for g in selected}
        return LatencyCurves(self.dense, self.base, saved)

    def saving_curve(self, group: Group, role: str) -> FloatArray:
        """[size + 1] ms saved when all groups timed with ``role`` keep as many units; extrapolated linearly below the
        narrowest measured width."""
        shares, saved = np.array([1.0, *KEPT_SHARES]), np.array([0.0, *self.roles[role]])
        slope = (saved[-1] - saved[-2]) / (shares[-2] - shares[-1])
        shares, saved = np.append(shares, 0.0), np.append(saved, saved[-1] + slope * shares[-1])
        rising = np.maximum.accumulate(np.maximum(saved, 0.0))
        kept = np.arange(group.size + 1) / group.size
        curve: FloatArray = self.base * np.interp(kept, shares[::-1], rising[::-1])
        return curve


def groups_to_time(analysis: Analysis, roles: Sequence[str]) -> list[Group]:
    """The groups of these roles that a target may cut: the residual stream with norms over it goes by ratio only."""
    of_roles = [g for g in analysis.groups if g.role in roles and g.prunable and g.size > 1]
    return [g for g in of_roles if not g.approximate or g.normalized_inside]


def timed_roles(groups: Sequence[Group]) -> dict[str, str]:
    """Group id -> the role with which it is narrowed: its own, or that of the first group of its tie."""
    first: dict[str, str] = {}
    return {g.id: first.setdefault(g.tie, g.role) if g.tie else g.role for g in groups}


def latency_table(
    analysis: Analysis,
    roles: Sequence[str],
    *,
    workload: Workload | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> LatencyTable:
    """The table of these roles: from the cache, or measured and cached. Raises UserError as ``time_pair``."""
    workload = workload or Workload()
    file = cache_folder() / f"latency-{cache_key(analysis, roles, workload, execution)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):  # a broken file is measured again
        data = json.loads(file.read_text())
        return LatencyTable(float(data["dense"]), float(data["base"]), {r: tuple(data["roles"][r]) for r in roles})
    table = measure_table(analysis, roles, workload, execution)
    with suppress(OSError):  # without a writable cache it is measured each time
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(file) as temporary:
            temporary.write_text(json.dumps(asdict(table), indent=1) + "\n")
    return table


def measure_table(analysis: Analysis, roles: Sequence[str], workload: Workload, execution: Execution) -> LatencyTable:
    pairs = 1 + len(roles) * len(KEPT_SHARES)
    with temporary_folder() as folder, execution.progress.stage("latency table", pairs) as advance:
        original = workload.timed_file(analysis.model.path, folder / "dense")
        base = workload.timed_file(write_narrowed(analysis, (), 1.0, folder / "base.onnx"), folder / "base")
        dense, ratio = time_pair(analysis, original, base, workload, execution)
        advance(1)
        saved, groups = {}, groups_to_time(analysis, roles)
        timed = timed_roles(groups)
        for role in roles:
            shares = []
            for share in KEPT_SHARES:
                narrowed = [g for g in groups if timed[g.id] == role]
                narrow = write_narrowed(analysis, narrowed, share, folder / "narrow.onnx")
                artifact = workload.timed_file(narrow, folder / "narrow")
                shares.append(1 - time_pair(analysis, base, artifact, workload, execution)[1])
                advance(1)
            saved[role] = tuple(shares)
    return LatencyTable(dense, dense * ratio, saved)


def write_narrowed(analysis: Analysis, groups: Sequence[Group], share: float, path: Path) -> Path:
    """Write the model with only the first units of these groups, to be timed; its outputs mean nothing."""
    widths = {g.id: min(max(1, round(share * g.size / g.step)) * g.step, g.size) for g in groups}
    keep = {g.id: (tuple(range(widths[g.id])),) * g.blocks for g in groups}
    keep = {name: rows for name, rows in keep.items() if len(rows[0]) < analysis.group(name).size}
    model = rewrite_model(analysis.traced_graph, cuts_of(SlicePlan(analysis, "", {}, keep))).model
    if analysis.reduction is not None:
        analysis.reduction.finalize(model)
    save(finalize(model), path)
    return path


def cache_key(analysis: Analysis, roles: Sequence[str], workload: Workload, execution: Execution) -> str:
    """A digest of everything that the times depend on."""
    machine = [cpu_name(), available_cores(), onnxruntime_version(), execution.provider]
    artifact = workload.artifact.name if workload.artifact else ""
    run = asdict(replace(workload, artifact=None))
    measured = [
        LATENCY_CACHE_FORMAT,
        analysis.digest,
        sorted(roles),
        sorted(workload.dim_sizes(analysis).items()),
        run,
        artifact,
    ]
    return hashlib.sha256(json.dumps([machine, measured], sort_keys=True).encode()).hexdigest()[:24]


def cache_folder() -> Path:
    """Where the system keeps a user's caches: ``$XDG_CACHE_HOME/snpc`` or ``~/.cache/snpc`` on Linux."""
    return platformdirs.user_cache_path("snpc", appauthor=False)
