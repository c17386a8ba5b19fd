"""Comparison of two models in front of what they select, and behind it on the same selections.

A detector takes the best boxes of thousands. Scores that are equal up to rounding change places, and outputs that are
lists of boxes then differ as a whole, although nothing is wrong. So each value that a selecting operator reads is
compared, and the outputs are compared with the selections of one model given to both: where all of these are equal,
only the order of equal scores can differ.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import onnx_ir as ir

from snpc.errors import CheckFailed, UserError
from snpc.graph import data_dependent_values, is_float
from snpc.ops import is_discontinuous
from snpc.passes.grouping import TracedGraph
from snpc.passes.propagation import RemovedUnits
from snpc.passes.slicing import RewrittenModel
from snpc.runtime.evaluation.compare import batch_differences
from snpc.runtime.evaluation.metrics import OutputMetrics
from snpc.runtime.execution import Execution, temporary_session
from snpc.runtime.io import read_model
from snpc.types import AnyArray, Difference, Feeds

Arrays = dict[str, AnyArray]


@dataclass(frozen=True)
class Selector:
    """A node that selects: what it reads (``read``) and what it says (``chosen``), by name of the values."""

    operator: str
    read: tuple[str, ...]
    chosen: tuple[str, ...]


@dataclass(frozen=True)
class EqualSelections:
    """Sliced against masked, and pruned against original, each pair on the same selections. ``selectors`` names the
    operators."""

    equals_mask: tuple[Difference, ...]
    drift: tuple[Difference, ...]
    selectors: str

    def describe(self) -> str:
        """The check, in words."""
        return (
            f"compared in front of {self.selectors}, and behind on the same selections: what is selected differs by "
            "the rounding of equal scores"
        )


def find_selectors(source: TracedGraph, removed: RemovedUnits) -> list[Selector]:
    """The nodes that select by floats that depend on the inputs, where no unit is removed from what they read."""
    selectors = []
    computed = data_dependent_values(source.model)
    for node in source.model.graph:
        if not is_discontinuous(node.domain, node.op_type):
            continue
        read = [v for v in node.inputs if v is not None and v in computed]
        if not any(is_float(source.facts.dtype.get(v)) for v in read):
            continue
        chosen = [v for v in node.outputs if v.uses() or v.is_graph_output()]
        traced = [source.trace.values[v] for v in (*read, *chosen) if v in source.trace.values]
        is_cut = any(removed.affects(labels) for value in traced for labels in value.factors)
        known = all(source.facts.dtype.get(v) is not None for v in (*read, *chosen))
        if known and not is_cut:
            names = (tuple(str(v.name) for v in values) for values in (read, chosen))
            selectors.append(Selector(f"{node.op_type} {node.name}", *names))
    return selectors


def name_selectors(selectors: Sequence[Selector], most: int = 2) -> str:
    """The operators, in words."""
    named = " and ".join(selector.operator for selector in selectors[:most])
    return named if len(selectors) <= most else f"{named} (and {len(selectors) - most} more)"


def compare_on_equal_selections(
    dense: ir.Model,
    pruned: Path,
    rewritten: RewrittenModel,
    batches: Sequence[tuple[Feeds, Feeds]],
    tolerance: float,
    metrics: OutputMetrics,
    execution: Execution,
    probes: int = 0,
) -> EqualSelections | None:
    """Compare the pruned file with its masked original and with the ``dense`` graph, each pair on the same selections.

    ``batches``: feeds of the file, and of its masked original where these are more (token decisions). None where
    nothing is selected, or where that cannot be run. The first ``probes`` batches say nothing about the original.
    Raises CheckFailed where values in front of a selection are not equal.
    """
    selectors = find_selectors(rewritten.source, rewritten.removed)
    file = read_model(pruned)
    present = {str(v.name) for node in file.graph for v in node.outputs}
    selectors = [s for s in selectors if present.issuperset(s.chosen)]
    if not selectors:
        return None
    outputs = [str(v.name) for v in file.graph.outputs]
    source, cut = rewritten.source, rewritten.sliced_interface()
    if rewritten.rounded is not None:  # float models are compared, which round nothing in front of a selection
        return None
    if cut:  # caches are compared in the narrower shapes, which differ in front of selections too
        return None
    comparison = Comparison(selectors, source.facts.types_by_name, execution)
    masked = rewritten.masked()
    feeds = [own for own, _ in batches]
    try:
        reference, sliced = comparison.run_both(masked, file, [more for _, more in batches], feeds)
        original, narrow = comparison.run_both(dense.clone(), read_model(pruned), feeds, feeds)
    except UserError:
        return None
    in_front = comparison.differences_in_front(reference, sliced, tolerance)
    rest = [name for name in outputs if name not in in_front]
    behind = batch_differences(only(reference, rest), only(sliced, rest))
    return EqualSelections(
        (*behind, *(in_front[name] for name in outputs if name in in_front)),
        batch_differences(only(original[probes:], outputs), only(narrow[probes:], outputs), metrics),
        name_selectors(selectors),
    )


def only(batches: Sequence[Arrays], names: Sequence[str]) -> list[Arrays]:
    return [{name: arrays[name] for name in names} for arrays in batches]


@dataclass(frozen=True)
class Comparison:
    """Runs models on given selections. ``types``: element types of values by name."""

    selectors: Sequence[Selector]
    types: Mapping[str, ir.DataType]
    execution: Execution

    def run_both(
        self, reference: ir.Model, other: ir.Model, feeds: Sequence[Feeds], other_feeds: Sequence[Feeds]
    ) -> tuple[list[Arrays], list[Arrays]]:
        """Outputs, and what selectors read, of both models on the selections of ``reference``."""
        chosen = [name for selector in self.selectors for name in selector.chosen]
        first = self.run(with_outputs(reference.clone(), chosen, self.types), feeds)
        given = [{given_name(name): arrays[name] for name in chosen} for arrays in first]
        both = [
            self.run(self.given_selections(model), [{**f, **s} for f, s in zip(own, given, strict=True)])
            for model, own in ((reference, feeds), (other, other_feeds))
        ]
        return both[0], both[1]

    def run(self, model: ir.Model, feeds: Sequence[Feeds]) -> list[Arrays]:
        with temporary_session(model, execution=self.execution, optimization="basic", memory="least") as run:
            return [run(batch) for batch in feeds]

    def given_selections(self, model: ir.Model) -> ir.Model:
        """``model``, changed in place: selections are inputs, and what selectors read are outputs."""
        values = {str(v.name): v for node in model.graph for v in node.outputs}
        chosen = dict.fromkeys(name for selector in self.selectors for name in selector.chosen)
        for name in chosen:
            given = ir.Value(name=given_name(name), type=ir.TensorType(self.types[name]))
            for node, index in list(values[name].uses()):
                node.replace_input_with(index, given)
            model.graph.inputs.append(given)
        read = [name for selector in self.selectors for name in selector.read if name in values and name not in chosen]
        return with_outputs(model, read, self.types)

    def differences_in_front(
        self, reference: Sequence[Arrays], other: Sequence[Arrays], tolerance: float
    ) -> dict[str, Difference]:
        """Name of a selection -> the largest difference of what it was made from. Raises CheckFailed where that is more
        than rounding."""
        largest: dict[str, Difference] = {}
        for selector in self.selectors:
            for name in selector.read:
                if name not in reference[0]:
                    continue
                (difference,) = batch_differences(only(reference, [name]), only(other, [name]))
                if difference.relative > tolerance:
                    raise CheckFailed(
                        f"{name}, by which {selector.operator} selects: the pruned model differs from its masked "
                        f"original by {difference.relative:.1e} relative ({difference.max_abs_diff:.1e} at most), more "
                        f"than {tolerance:.0e}"
                    )
                for chosen in selector.chosen:
                    found = replace(difference, output=chosen)
                    largest[chosen] = max(largest.get(chosen, found), found, key=lambda d: d.relative)
        return largest


def given_name(selection: str) -> str:
    """The input that gives a selection."""
    return f"{selection}__given"


def with_outputs(model: ir.Model, names: Sequence[str], types: Mapping[str, ir.DataType]) -> ir.Model:
    """``model``, changed in place, with these values as outputs too."""
    values = {str(v.name): v for node in model.graph for v in node.outputs}
    for name in dict.fromkeys(names):
        value = values[name]
        if not value.is_graph_output():
            value.type = ir.TensorType(types[name])
            model.graph.outputs.append(value)
    return model
