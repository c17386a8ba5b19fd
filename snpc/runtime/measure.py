"""Statistics inside the graph: sums that onnxruntime computes beside the model, so that activations are never held.

For each probe (an activation in which a group's units can be seen) the instrumented model gets a few more outputs:
``energy`` [samples, blocks, size], the sum over rows of squares, and ``gram`` [samples, blocks, size, size], X^T X.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

from snpc.errors import CheckFailed
from snpc.passes.analyze import Analysis
from snpc.runtime.feeds import Feeds
from snpc.runtime.model_io import clean, save
from snpc.runtime.session import open_session
from snpc.types import FloatArray, Group, IntArray, Probe


@dataclass(frozen=True)
class Wanted:
    """One statistic of one group: ``kind`` is a method of ``Instrument`` (energy, gram, moment, centred, sums);
    ``output`` names the instrumented model's output."""

    group: Group
    probe: Probe
    kind: str
    output: str

    @property
    def name(self) -> str:
        return f"{self.kind}:{self.probe.kind}"


def wanted_statistics(analysis: Analysis, names: Mapping[str, Sequence[str]]) -> list[Wanted]:
    """Statistics to measure: group id -> names such as "gram:query"."""
    found: list[Wanted] = []
    for group in analysis.groups:
        for name in names.get(group.id, ()):
            kind, _, probe_kind = name.partition(":")
            for probe in group.probes:
                if probe.kind == probe_kind:
                    found.append(Wanted(group, probe, kind, f"snpc_stat_{len(found)}"))
    return found


@dataclass(frozen=True)
class Layout:
    """How a probed tensor is turned into rows x units: a leading split of axis 0 where it merges batch and blocks,
    then row axes before unit axes, then a gather of columns (several columns may show one unit)."""

    period: int
    rank: int
    row_axes: tuple[int, ...]
    unit_axes: tuple[int, ...]
    columns: IntArray
    repeats: int


def layout_of(probe: Probe, units: int) -> Layout:
    numbers = probe.units
    period = 0
    if numbers.shape[0] > 1:
        period = shortest_period(np.moveaxis(numbers, 0, -1).reshape(-1, numbers.shape[0]))
        numbers = numbers[None, :period]
    rank = numbers.ndim
    unit_axes = tuple(k for k in range(1, rank) if numbers.shape[k] > 1) or (rank - 1,)
    row_axes = tuple(k for k in range(1, rank) if k not in unit_axes)
    flat = numbers.transpose(0, *row_axes, *unit_axes).reshape(-1)
    columns = [np.flatnonzero(flat == unit) for unit in range(units)]
    repeats = min(len(c) for c in columns)
    if not repeats or max(len(c) for c in columns) != repeats:
        raise CheckFailed(f"{probe.tensor}: some of its units are seen more often than others")
    order = np.stack(columns).T.reshape(-1)  # [repeats, units]
    return Layout(period, rank, row_axes, unit_axes, order, repeats)


def shortest_period(rows: IntArray) -> int:
    size = int(rows.shape[1])
    for period in range(1, size):
        if size % period == 0 and bool((rows == np.tile(rows[:, :period], size // period)).all()):
            return period
    return size


class Instrument:
    """Appends statistics to a copy of a model."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model.clone()
        self.values = {str(v.name): v for node in self.model.graph for v in node.outputs}
        self.values |= {str(v.name): v for v in self.model.graph.inputs}
        self.values |= dict(self.model.graph.initializers)
        self.prepared: dict[tuple[str, bytes, int], tuple[ir.Value, Layout]] = {}
        self.count = 0
        self.version = self.model.graph.opset_imports.get("", 17)
        self.model.graph.outputs.clear()

    def op(self, name: str, inputs: list[ir.Value], **attrs: int | list[int]) -> ir.Value:
        self.count += 1
        node = ir.node(name, inputs, attributes=attrs or None, name=f"snpc_measure_{self.count}")
        node.outputs[0].name = f"snpc_measure_{self.count}_out"
        self.model.graph.append(node)
        return node.outputs[0]

    def ints(self, numbers: Iterable[int]) -> ir.Value:
        self.count += 1
        name = f"snpc_measure_{self.count}"
        tensor = ir.Tensor(np.asarray(list(numbers), np.int64), name=name)
        value = ir.Value(name=name, const_value=tensor, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
        self.model.graph.register_initializer(value)
        return value

    def rows(self, probe: Probe, units: int) -> tuple[ir.Value, Layout]:
        """[samples, rows, repeats * units] in float32."""
        key = (probe.tensor, probe.units.tobytes(), units)
        if key not in self.prepared:
            layout = layout_of(probe, units)
            value = self.op("Cast", [self.values[probe.tensor]], to=int(ir.DataType.FLOAT))
            if layout.period:
                shape = self.op("Shape", [value])
                rest = self.op("Slice", [shape, self.ints([1]), self.ints([1 << 30])])
                head = self.ints([-1, layout.period])
                value = self.op("Reshape", [value, self.op("Concat", [head, rest], axis=0)])
            value = self.op("Transpose", [value], perm=[0, *layout.row_axes, *layout.unit_axes])
            total = int(np.prod([self.axis_size(probe, layout, k) for k in layout.unit_axes], dtype=np.int64))
            value = self.op("Reshape", [value, self.ints([0, -1, total])])
            if layout.columns.tolist() != list(range(total)):
                value = self.op("Gather", [value, self.ints(layout.columns.tolist())], axis=2)
            self.prepared[key] = (value, layout)
        return self.prepared[key]

    def axis_size(self, probe: Probe, layout: Layout, axis: int) -> int:
        return int(
            probe.units.shape[axis - 1]
            if layout.period and axis > 1
            else layout.period
            if layout.period
            else probe.units.shape[axis]
        )

    def energy(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        rows, _layout = self.rows(probe, blocks * size)
        squares = self.op("Mul", [rows, rows])
        split = self.op("Reshape", [squares, self.ints([0, -1, blocks, size])])
        return self.total(split)

    def total(self, value: ir.Value) -> ir.Value:
        if self.version >= 13:
            return self.op("ReduceSum", [value, self.ints([1])], keepdims=0)
        return self.op("ReduceSum", [value], axes=[1], keepdims=0)

    def gram(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        rows, _layout = self.rows(probe, blocks * size)
        split = self.op("Reshape", [rows, self.ints([0, -1, blocks, size])])  # repeats become rows
        columns = self.op("Transpose", [split], perm=[0, 2, 3, 1])
        return self.op("MatMul", [columns, self.op("Transpose", [split], perm=[0, 2, 1, 3])])

    def by_block(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[blocks, samples, rows, size]."""
        rows, _ = self.rows(probe, blocks * size)
        return self.op("Transpose", [self.op("Reshape", [rows, self.ints([0, -1, blocks, size])])], perm=[2, 0, 1, 3])

    def product(self, value: ir.Value, blocks: int, size: int) -> ir.Value:
        """[blocks, size, size]: X'X over samples and rows."""
        flat = self.op("Reshape", [value, self.ints([blocks, -1, size])])
        return self.op("MatMul", [self.op("Transpose", [flat], perm=[0, 2, 1]), flat])

    def moment(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        return self.product(self.by_block(probe, blocks, size), blocks, size)

    def centred(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """As ``moment``, of rows less the mean of their own sample."""
        value = self.by_block(probe, blocks, size)
        if self.version >= 18:
            mean = self.op("ReduceMean", [value, self.ints([2])], keepdims=1)
        else:
            mean = self.op("ReduceMean", [value], axes=[2], keepdims=1)
        return self.product(self.op("Sub", [value, mean]), blocks, size)

    def sums(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[blocks, size + 1]: the sum of the rows, and how many they are."""
        value = self.op("Reshape", [self.by_block(probe, blocks, size), self.ints([blocks, -1, size])])
        one = self.op("Gather", [value, self.ints([0])], axis=2)
        ones = self.op("Exp", [self.op("Sub", [one, one])])
        return self.total(self.op("Concat", [value, ones], axis=2))

    def gap(self, probe: Probe, size: int, value: str, dense: str, dtype: ir.DataType) -> tuple[ir.Value, ir.Value]:
        """(sum of unit' gap [1, size, D], sum of gap [1, D]), gap = dense - value, over the rows of a probe that shows
        every unit once, along its last axis; ``dense`` is a new input of the type and shape of ``value``."""
        entering = ir.Value(name=dense, type=ir.TensorType(dtype))
        self.model.graph.inputs.append(entering)
        both = [self.op("Cast", [v], to=int(ir.DataType.FLOAT)) for v in (entering, self.values[value])]
        gap = self.op("Sub", both)
        width = self.op("Slice", [self.op("Shape", [gap]), self.ints([-1]), self.ints([1 << 30])])
        flat = self.op("Reshape", [gap, self.op("Concat", [self.ints([1, -1]), width], axis=0)])
        units = self.op("Reshape", [self.by_block(probe, 1, size), self.ints([1, -1, size])])
        cross = self.op("MatMul", [self.op("Transpose", [units], perm=[0, 2, 1]), flat])
        return cross, self.total(flat)

    def add(self, wanted: Wanted) -> None:
        self.expose(getattr(self, wanted.kind)(wanted.probe, wanted.group.blocks, wanted.group.size), wanted.output)

    def expose(self, value: ir.Value, name: str) -> None:
        value.name = name
        value.dtype = ir.DataType.FLOAT
        self.model.graph.outputs.append(value)


def measure(
    analysis: Analysis, wanted: Sequence[Wanted], batches: Iterable[Feeds], *, provider: str = "cpu", threads: int = 0
) -> Iterator[dict[str, FloatArray]]:
    """Run the instrumented model over ``batches``; per batch: output name -> statistic in float64."""
    instrument = Instrument(analysis.traced.model)
    for item in wanted:
        instrument.add(item)
    with tempfile.TemporaryDirectory(prefix="snpc-") as folder:
        path = Path(folder) / "measured.onnx"
        save(clean(instrument.model), path)
        session = open_session(path, provider=provider, threads=threads)
        names = [w.output for w in wanted]
        inputs = {i.name for i in session.get_inputs()}
        for feeds in batches:
            results = session.run(names, {k: v for k, v in feeds.items() if k in inputs})
            yield {name: np.asarray(r, np.float64) for name, r in zip(names, results, strict=True)}
