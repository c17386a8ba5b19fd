"""Files beside their original: what each costs, which widths are left, and how close its outputs are.

The files may be pruned, finetuned, built or quantized, at any time after they were written. What was cut is read from
their provenance, or from the shapes of constants that have the same names.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from snpc.errors import UserError
from snpc.passes import Analysis, analyze, macs_by_role
from snpc.passes.canonicalization import original_name
from snpc.pipeline import measure_quality, verification_data
from snpc.planning import ProvenanceStep, provenance_in, pruning_of, read_provenance, widths_of
from snpc.runtime.calibration import Calibration, TextOptions, find_tokenizer, load_calibration
from snpc.runtime.evaluation import EvaluationData, MetricRequest, task_change, task_score, with_metrics
from snpc.runtime.execution import ARTIFACT_SUFFIXES, DEFAULT_EXECUTION, ENGINE_SUFFIXES, Execution, stored_metadata
from snpc.runtime.io import file_bytes, load
from snpc.types import Cost, Group, IntArray, Model, Quality, Site, TaskChange

MAX_COMPARED = 6  # beside the original: so many colors can be told apart


@dataclass(frozen=True)
class ComparedFile:
    """One file beside the original.

    ``cost``: None of an artifact that is no ONNX file. ``macs_by_role``: empty where some products are not counted, as
    in fused nodes. ``provenance``: what the file says of how it was made, step by step. ``kept``: group id of
    the original -> units per block, of the groups whose width is known. ``quality``: of its outputs, by the original's.
    ``task``: on labels, where there are some.
    """

    path: Path
    bytes: int
    quality: Quality
    cost: Cost | None = None
    macs_by_role: Mapping[str, int] = field(default_factory=dict)
    provenance: tuple[ProvenanceStep, ...] = ()
    kept: Mapping[str, int] = field(default_factory=dict)
    task: TaskChange | None = None

    @property
    def macs(self) -> int | None:
        """None where not all products are counted."""
        return self.cost.macs if self.cost is not None and self.macs_by_role else None


@dataclass(frozen=True)
class FileComparison:
    """``analysis``: of the original. ``calibration``: the data that outputs were compared on; None: random inputs."""

    analysis: Analysis
    files: tuple[ComparedFile, ...]
    calibration: Calibration | None = field(default=None, repr=False)


def compare_files(
    original: Analysis | Path | str,
    files: Sequence[Path | str],
    *,
    calibration: Calibration | Any = None,
    evaluation: EvaluationData | None = None,
    metric: MetricRequest | None = None,
    execution: Execution = DEFAULT_EXECUTION,
) -> FileComparison:
    """Compare ``files`` with the model that they were made of, for ``write_report``.

        comparison = snpc.compare_files("model.onnx", ["half.onnx", "tuned.onnx"], calibration="calib.npz")
        snpc.write_report(comparison, "report.html")

    ``original``: its path, or its analysis at sizes of your own. ``files``: pruned, finetuned, built or quantized ones,
    .onnx, .ort and OpenVINO's .xml, at most six. ``calibration``: a ``Calibration``, or what ``load_calibration``
    reads; outputs are compared on its held-out samples, on all of it where it has none, and without data on random
    inputs, which say nothing of accuracy. ``evaluation``: data with labels, on which all are scored. ``metric``: how
    outputs are judged. Raises UserError for a file that cannot be read, or that does not take the original's inputs.
    """
    paths = [Path(path) for path in files]
    if not paths:
        raise UserError("nothing to compare: name at least one file beside the original")
    if len(paths) > MAX_COMPARED:
        raise UserError(f"{len(paths)} files: a page shows at most {MAX_COMPARED} beside the original")
    for path in paths:
        if path.suffix in ENGINE_SUFFIXES:
            raise UserError(f"{path}: engines are not run by this version: leave it out")
    analysis = original if isinstance(original, Analysis) else analyze(load(original))
    analysis = with_metrics(analysis, metric)
    data = loaded_calibration(calibration, analysis)
    feeds = verification_data(analysis, data, fitted_to=False, execution=execution)
    qualities = measure_quality(analysis, paths, feeds, execution)
    tasks = measure_tasks(analysis.model.path, paths, evaluation, execution)
    measured = zip(paths, qualities, tasks, strict=True)
    compared = tuple(compared_file(analysis, path, quality, task) for path, quality, task in measured)
    return FileComparison(analysis, compared, data)


def loaded_calibration(calibration: Calibration | Any, analysis: Analysis) -> Calibration | None:
    """Data that are no ``Calibration`` yet are loaded."""
    if calibration is None or isinstance(calibration, Calibration):
        return calibration
    text = TextOptions(find_tokenizer(analysis.model.source))
    return load_calibration(calibration, analysis.model.inputs, text=text)


def measure_tasks(
    original: Path, files: Sequence[Path], evaluation: EvaluationData | None, execution: Execution
) -> list[TaskChange | None]:
    """The score of each file, of the original once; None of each without labels."""
    if evaluation is None or evaluation.labels is None:
        return [None] * len(files)
    dense = task_score(original, evaluation, execution)
    return [task_change(dense, task_score(file, evaluation, execution), evaluation) for file in files]


def compared_file(analysis: Analysis, path: Path, quality: Quality, task: TaskChange | None) -> ComparedFile:
    """What can be read from the file, with what was measured."""
    if path.suffix in ARTIFACT_SUFFIXES:
        steps = provenance_in(stored_metadata(path))
        kept = widths_of_provenance(steps, analysis)
        return ComparedFile(path, artifact_bytes(path), quality, provenance=steps, kept=kept, task=task)
    model = load(path)
    cost, roles = cost_and_roles(analysis, model)
    steps = read_provenance(model.graph)
    kept = widths_of_provenance(steps, analysis) or widths_of_constants(model, analysis)
    return ComparedFile(path, file_bytes(path), quality, cost, roles, steps, kept, task)


def artifact_bytes(path: Path) -> int:
    """Of the file, and of the weights of an OpenVINO IR."""
    weights = path.with_suffix(".bin")
    return path.stat().st_size + (weights.stat().st_size if path.suffix == ".xml" and weights.is_file() else 0)


def cost_and_roles(analysis: Analysis, model: Model) -> tuple[Cost, Mapping[str, int]]:
    """The costs of a file, and its MACs by role at the sizes of the original's; none where it has products that are not
    counted and the original's are."""
    names = {dim for spec in model.inputs for dim in spec.shape if isinstance(dim, str)}
    own = analyze(model, {name: size for name, size in analysis.dim_sizes.items() if name in names})
    counted = own.cost.not_counted == analysis.cost.not_counted
    return own.cost, macs_by_role(own) if counted else {}


# -- what was cut ----------------------------------------------------------------------------------------------------


def widths_of_provenance(steps: Sequence[ProvenanceStep], analysis: Analysis) -> dict[str, int]:
    """Units per block of all groups, as the one step says that cut the original; none where there was none, or
    another one after it."""
    step = pruning_of(steps, analysis.model.digest)
    widths = widths_of(step) if step is not None else {}
    known = {group.id: group for group in analysis.groups}
    if any(name not in known or known[name].size != before for name, (before, _) in widths.items()):
        return {}
    return {group.id: widths.get(group.id, (0, group.size))[1] for group in known.values()} if step is not None else {}


def widths_of_constants(model: Model, analysis: Analysis) -> dict[str, int]:
    """Units per block of the groups whose width follows from the lengths of constants under the same names.

    A packed weight of queries, keys and values holds several groups: its length says the width of one where the others
    are known.
    """
    values = analysis.traced_graph.model.graph.initializers
    shapes = {
        original_name(value): value.shape.numpy()
        for value in model.graph.graph.initializers.values()
        if value.shape is not None and value.shape.is_static()
    }
    axes: dict[tuple[str, int], AxisOfGroups] = {}
    for group in analysis.groups:
        for site in group.sites:
            name = original_name(values[site.tensor])
            if site.axis < len(shapes.get(name, ())):
                length = shapes[name][site.axis]
                axes.setdefault((name, site.axis), AxisOfGroups(len(site.units), length)).add(group, site)
    known: dict[str, int] = {}
    while found := {
        name: width
        for axis in axes.values()
        for name, width in axis.widths(known).items()
        if name not in known and width is not None
    }:
        known |= found
    return known


@dataclass
class AxisOfGroups:
    """An axis of a constant, ``length`` entries long in the original and ``left`` in the file, and which of its entries
    are units of which group."""

    length: int
    left: int
    entries: dict[str, tuple[Group, IntArray]] = field(default_factory=dict)

    def add(self, group: Group, site: Site) -> None:
        self.entries[group.id] = group, np.flatnonzero(site.units >= 0)

    def widths(self, known: Mapping[str, int]) -> dict[str, int | None]:
        """Group id -> its units per block, None where that does not follow."""
        if self.left == self.length:
            return {name: group.size for name, (group, _) in self.entries.items()}
        return {name: self.width_of(group, own, known) for name, (group, own) in self.entries.items()}

    def width_of(self, group: Group, own: IntArray, known: Mapping[str, int]) -> int | None:
        """Of a group whose entries no other group has: heads and channels within them cannot be told apart."""
        gone = 0.0
        for name, (other, places) in self.entries.items():
            if name == group.id:
                continue
            if np.intersect1d(own, places).size or name not in known:
                return None
            gone += len(places) * (1 - known[name] / other.size)
        width = group.size * (1 - (self.length - self.left - gone) / len(own))
        return round(width) if abs(width - round(width)) < 1e-6 and 0 <= round(width) <= group.size else None
