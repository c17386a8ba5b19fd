"""Statistics as nodes of the graph: the runtime sums them along with the model, so that no activation is kept."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from snpc.graph import add_constant, attribute_values, copy_node, make_node
from snpc.ops import ATTENTION_FORMS, AttentionForm
from snpc.ops import names as op
from snpc.passes.token_analysis import PaddingSource
from snpc.runtime.batches import row_strips
from snpc.runtime.statistics.probe_layout import ProbeLayout, RowMask, infer_probe_layout
from snpc.types import BoolArray, FloatArray, Probe

SLICE_END = 1 << 30  # larger than any rank
TURN = 1 << 16
GOLDEN = 40503  # of a TURN: the golden ratio less one


class Instrument:
    """Appends statistics to a copy of a model, as new outputs in place of its own.

    ``row_masks``: tensor -> the input that says which of its rows count (all rows of other tensors do). Such an input
    is added to the copy when a statistic first needs it. ``row_scale`` [1, rows, 1]: what every row of every probe is
    multiplied by, the square root of its weight; None: all weigh the same. Methods that return a value document its
    shape.
    """

    def __init__(
        self,
        model: ir.Model,
        row_masks: Mapping[str, RowMask] | None = None,
        row_scale: FloatArray | None = None,
    ) -> None:
        self.model = model.clone()
        self.values = {str(v.name): v for node in self.model.graph for v in node.outputs}
        self.values |= {str(v.name): v for v in self.model.graph.inputs}
        self.values |= dict(self.model.graph.initializers)
        self.row_masks = row_masks or {}
        self.row_scale = row_scale
        self.mask_inputs: dict[str, ir.Value] = {}
        self.rows_cache: dict[tuple[str, bytes, int], ir.Value] = {}
        self.count = 0
        self.version = self.model.graph.opset_imports.get("", 17)
        self.model.graph.outputs.clear()

    # -- nodes

    def node(self, name: str, inputs: Sequence[ir.Value], **attrs: int | list[int]) -> ir.Value:
        self.count += 1
        node = make_node(name, inputs, attrs, name=f"snpc_measure_{self.count}")
        self.model.graph.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray[tuple[int, ...], np.dtype[np.generic]]) -> ir.Value:
        self.count += 1
        return add_constant(self.model.graph, array, f"snpc_measure_{self.count}")

    def ints(self, numbers: Iterable[int]) -> ir.Value:
        return self.constant(np.asarray(list(numbers), np.int64))

    def integer(self, number: int) -> ir.Value:
        return self.constant(np.array(number, np.int64))

    def cast_float32(self, value: ir.Value) -> ir.Value:
        return self.node(op.CAST, [value], to=int(ir.DataType.FLOAT))

    def reshape(self, value: ir.Value, *shape: int) -> ir.Value:
        return self.node(op.RESHAPE, [value, self.ints(shape)])

    def transpose(self, value: ir.Value, *perm: int) -> ir.Value:
        return self.node(op.TRANSPOSE, [value], perm=list(perm))

    def shape_slice(self, value: ir.Value, first: int, last: int = SLICE_END) -> ir.Value:
        """The sizes of axes ``first`` to ``last`` (not included)."""
        return self.node(op.SLICE, [self.node(op.SHAPE, [value]), self.ints([first]), self.ints([last])])

    def reduce(self, name: str, value: ir.Value, axes: Sequence[int], keep: bool = False) -> ir.Value:
        if self.version >= op.REDUCTION_AXES_INPUT_SINCE[name]:
            return self.node(name, [value, self.ints(axes)], keepdims=int(keep))
        return self.node(name, [value], axes=list(axes), keepdims=int(keep))

    def add_input(self, name: str, dtype: ir.DataType) -> ir.Value:
        value = ir.Value(name=name, type=ir.TensorType(dtype))
        self.model.graph.inputs.append(value)
        return value

    def add_output(self, value: ir.Value, name: str, dtype: ir.DataType = ir.DataType.FLOAT) -> None:
        if value.producer() is None:  # an input keeps its name
            value = self.node(op.IDENTITY, [value])
        value.name = name
        value.type = ir.TensorType(dtype)
        self.model.graph.outputs.append(value)

    def add_values(self, names: Iterable[str], types: Mapping[str, ir.DataType]) -> None:
        """Values of the model as outputs under their own names."""
        for name in names:
            self.add_output(self.values[name], name, types[name])

    def activation(self, name: str) -> ir.Value:
        """A value of the model, or the query, key or value inside a fused attention node ("node.q")."""
        if name not in self.values:
            node_name, _, part = name.rpartition(".")
            node = next(n for n in self.model.graph if n.name == node_name)
            self.values[name] = self.fused_projection(node, "qkv".index(part))
        return self.values[name]

    def fused_projection(self, node: ir.Node, part: int) -> ir.Value:
        """[batch, tokens, heads * width]: query (``part`` 0), key or value of a fused node."""
        form = ATTENTION_FORMS[node.domain, node.op_type]
        inputs = [*node.inputs, *[None] * 12]
        query, bias = inputs[form.query], None if form.bias is None else inputs[form.bias]
        assert query is not None
        if form.packed == "weight":
            weight = inputs[1]
            assert weight is not None and weight.shape is not None
            sizes = attribute_values(node).get("qkv_hidden_sizes") or [int(weight.shape[1]) // 3] * 3  # type: ignore[arg-type]
            ends = [self.ints([int(n)]) for n in np.cumsum([0, *sizes])]
            merged = self.node(op.MATMUL, [query, weight])
            merged = merged if bias is None else self.node(op.ADD, [merged, bias])
            return self.node(op.SLICE, [merged, ends[part], ends[part + 1], self.ints([2])])
        if inputs[form.key] is None:
            ends = self.packed_ends(node, query)
            return self.node(op.SLICE, [query, ends[part], ends[part + 1], self.ints([2])])
        return self.biased_operand(form, inputs, part)

    def packed_ends(self, node: ir.Node, packed: ir.Value) -> list[ir.Value]:
        """Where query, key and value begin and end in an input that holds the heads of all three."""
        heads = int(attribute_values(node)["num_heads"])
        kv_heads = int(attribute_values(node).get("kv_num_heads", heads))
        width = self.node(op.DIV, [self.shape_slice(packed, 2, 3), self.ints([heads + 2 * kv_heads])])
        counts = np.cumsum([0, heads, kv_heads, kv_heads]).tolist()
        return [self.node(op.MUL, [width, self.ints([n])]) for n in counts]

    def fused_heads(self, node_name: str, name: str, part: int, heads: int) -> ir.Value:
        """[batch, heads, tokens, width]: query (``part`` 0) or key of a fused node, as its product takes it: turned by
        the rotary tables from position 0 on, key heads repeated to ``heads``. Past keys are not in it."""
        flat = self.activation(name)
        node = next(n for n in self.model.graph if n.name == node_name)
        attributes = attribute_values(node)
        own = int(attributes.get("kv_num_heads", attributes.get("q_num_heads", heads))) if part else heads
        split = self.transpose(self.reshape(flat, 0, 0, own, -1), 0, 2, 1, 3)
        rotary = ATTENTION_FORMS[node.domain, node.op_type].rotary
        tables = [table for k in rotary if k < len(node.inputs) and (table := node.inputs[k]) is not None]
        if attributes.get("do_rotary", 0) and len(tables) == 2:
            split = self.rotated(split, tables, own, node)
        repeated = np.repeat(np.arange(own), heads // own)
        return split if own == heads else self.node(op.GATHER, [split, self.ints(repeated.tolist())], axis=1)

    def rotated(self, split: ir.Value, tables: Sequence[ir.Value], heads: int, node: ir.Node) -> ir.Value:
        """``split`` [batch, heads, tokens, width], turned as the fused ``node`` does it behind no past."""
        self.count += 1
        interleaved = int(attribute_values(node).get("rotary_interleaved", 0))
        rotary = make_node(
            op.ROTARY_EMBEDDING,
            [split, self.ints([0]), *tables],
            {"interleaved": interleaved, "num_heads": heads},
            name=f"snpc_measure_{self.count}_rotary",
            domain=node.domain,
        )
        self.model.graph.append(rotary)
        return rotary.outputs[0]

    def biased_operand(self, form: AttentionForm, inputs: Sequence[ir.Value | None], part: int) -> ir.Value:
        """An input plus its part of the bias that the node adds to query, key and value."""
        bias = None if form.bias is None else inputs[form.bias]
        assert bias is not None
        ends = [self.ints([0])]
        axis = 1 if form.one_row else 2
        for index in (form.query, form.key, form.value):
            value = inputs[index]
            assert value is not None
            ends.append(self.node(op.ADD, [ends[-1], self.shape_slice(value, axis, axis + 1)]))
        operand = inputs[(form.query, form.key, form.value)[part]]
        assert operand is not None
        biased = self.node(op.ADD, [operand, self.node(op.SLICE, [bias, ends[part], ends[part + 1], self.ints([0])])])
        if not form.one_row:
            return biased
        batched = self.node(op.CONCAT, [self.ints([1]), self.node(op.SHAPE, [biased])], axis=0)
        return self.node(op.RESHAPE, [biased, batched])

    # -- rows

    def row_mask(self, tensor: str) -> ir.Value | None:
        """[samples, rows, 1] bool: which rows of a tensor count; None where all do."""
        row_mask = self.row_masks.get(tensor)
        if row_mask is None:
            return None
        if row_mask.name not in self.mask_inputs:
            self.mask_inputs[row_mask.name] = self.add_input(row_mask.name, ir.DataType.BOOL)
        value = self.mask_inputs[row_mask.name]
        if row_mask.order == "merged":
            return self.reshape(value, -1, 1, 1)
        value = self.transpose(value, 1, 0) if row_mask.order == "tokens_first" else value
        return self.reshape(value, 0, -1, 1)

    def zero_masked(self, value: ir.Value, mask: ir.Value | None) -> ir.Value:
        """``value`` with zeros in the rows that do not count."""
        if mask is None:
            return value
        return self.node(op.WHERE, [mask, value, self.constant(np.zeros((), np.float32))])

    def scale_rows(self, value: ir.Value) -> ir.Value:
        """``value`` [..., rows, n] with its rows scaled by their weights."""
        if self.row_scale is None:
            return value
        return self.node(op.MUL, [value, self.constant(self.row_scale.astype(np.float32))])

    def rows(self, probe: Probe, units: int) -> ir.Value:
        """[samples, rows, repeats * units] in float32, zero in rows that do not count."""
        key = (probe.tensor, probe.units.tobytes(), units)
        if key not in self.rows_cache:
            layout = infer_probe_layout(probe, units)
            value = self.cast_float32(self.activation(probe.tensor))
            if layout.period:
                head = self.ints([-1, layout.period])
                value = self.node(op.RESHAPE, [value, self.node(op.CONCAT, [head, self.shape_slice(value, 1)], axis=0)])
            value = self.transpose(value, 0, *layout.row_axes, *layout.unit_axes)
            total = int(np.prod([probed_axis_size(probe, layout, k) for k in layout.unit_axes], dtype=np.int64))
            value = self.reshape(value, 0, -1, total)
            if not layout.shows_all:  # the column behind the others stands for units that are not seen
                first = self.node(op.GATHER, [value, self.ints([0])], axis=2)
                value = self.node(op.CONCAT, [value, self.node(op.SUB, [first, first])], axis=2)
            if layout.columns.tolist() != list(range(total)):
                value = self.node(op.GATHER, [value, self.ints(layout.columns.tolist())], axis=2)
            self.rows_cache[key] = self.scale_rows(self.zero_masked(value, self.row_mask(probe.tensor)))
        return self.rows_cache[key]

    def block_rows(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[samples, rows, blocks, size]; several columns of one unit become several rows."""
        return self.reshape(self.rows(probe, blocks * size), 0, -1, blocks, size)

    def rows_by_block(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[blocks, samples, rows, size]."""
        return self.transpose(self.block_rows(probe, blocks, size), 2, 0, 1, 3)

    def block_row_mask(self, probe: Probe, units: int) -> ir.Value | None:
        """[samples, rows, 1] bool: which rows of ``rows_by_block`` count; None where all do."""
        mask = self.row_mask(probe.tensor)
        repeats = infer_probe_layout(probe, units).repeats
        if mask is None or repeats == 1:
            return mask
        return self.reshape(self.node(op.CONCAT, [mask] * repeats, axis=2), 0, -1, 1)

    def ones_column(self, rows: ir.Value, mask: ir.Value | None) -> ir.Value:
        """[.., samples, rows, 1]: for ``rows`` [.., samples, rows, size] ones, and zeros where a row does not count."""
        first = self.node(op.GATHER, [rows, self.ints([0])], axis=-1)
        return self.scale_rows(self.zero_masked(self.node(op.EXP, [self.node(op.SUB, [first, first])]), mask))

    def ones_of_shown(self, ones: ir.Value, shown: BoolArray) -> ir.Value:
        """``ones`` [.., samples, rows, 1] with zeros for blocks that are not ``shown`` [..]."""
        if shown.all():
            return ones
        return self.node(op.MUL, [ones, self.constant(shown[..., None, None, None].astype(np.float32))])

    # -- statistics, one method per kind

    def add_statistic(self, kind: str, probe: Probe, blocks: int, size: int, output: str) -> None:
        """Append a statistic of a group of ``blocks`` x ``size`` units, as a new output of that name."""
        kinds = {
            "energy": self.energy,
            "gram": self.gram,
            "moment": self.moment,
            "gram_centered": self.gram_centered,
            "row_sums": self.row_sums,
            "gram_per_repeat": self.gram_per_repeat,
            "routed": self.routed,
        }
        self.add_output(kinds[kind](probe, blocks, size), output)

    def energy(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[samples, blocks, size]: the sum over rows of squares."""
        rows = self.block_rows(probe, blocks, size)
        return self.reduce(op.REDUCE_SUM, self.node(op.MUL, [rows, rows]), [1])

    def routed(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[1, 2, experts]: the sum of the norms of what each expert adds to its tokens, and the number of these."""
        value = self.cast_float32(self.activation(probe.tensor))
        squares = self.reduce(op.REDUCE_SUM, self.node(op.MUL, [value, value]), [-1])
        norms = self.node(op.SQRT, [self.node(op.RESHAPE, [squares, self.ints([-1, 1])])])
        if probe.chosen:
            numbers = self.node(
                op.GATHER, [self.ints(probe.units.tolist()), self.reshape(self.values[probe.chosen], -1)]
            )
        else:
            count = self.shape_slice(norms, 0, 1)
            numbers = self.node(op.EXPAND, [self.ints(probe.units.reshape(-1).tolist()), count])
        is_own = self.node(op.EQUAL, [self.reshape(numbers, -1, 1), self.ints(range(blocks * size))])
        shares = self.cast_float32(is_own)
        sums = self.reduce(op.REDUCE_SUM, self.node(op.MUL, [norms, shares]), [0], keep=True)
        both = self.node(op.CONCAT, [sums, self.reduce(op.REDUCE_SUM, shares, [0], keep=True)], axis=0)
        return self.reshape(both, 1, 2, blocks * size)

    def gram(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[samples, blocks, size, size]: X'X over the rows of a sample."""
        rows = self.block_rows(probe, blocks, size)
        return self.node(op.MATMUL, [self.transpose(rows, 0, 2, 3, 1), self.transpose(rows, 0, 2, 1, 3)])

    def moment(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[blocks, size, size]: X'X over samples and rows."""
        return self.block_gram(self.rows_by_block(probe, blocks, size), blocks, size)

    def gram_centered(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[blocks, size, size]: X'X over samples and rows, each row less the mean of its sample."""
        rows, mask = self.rows_by_block(probe, blocks, size), self.block_row_mask(probe, blocks * size)
        sums = [self.reduce(op.REDUCE_SUM, value, [2], keep=True) for value in (rows, self.ones_column(rows, mask))]
        centered = self.node(op.SUB, [rows, self.node(op.DIV, sums)])
        return self.block_gram(self.zero_masked(centered, mask), blocks, size)

    def row_sums(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[blocks, size + 1]: the sum of the rows, and their number."""
        rows = self.rows_by_block(probe, blocks, size)
        ones = self.ones_column(rows, self.block_row_mask(probe, blocks * size))
        ones = self.ones_of_shown(ones, infer_probe_layout(probe, blocks * size).is_shown(blocks)[0])
        return self.reduce(op.REDUCE_SUM, self.node(op.CONCAT, [rows, ones], axis=3), [1, 2])

    def gram_per_repeat(self, probe: Probe, blocks: int, size: int) -> ir.Value:
        """[repeats, blocks, size + 1, size + 1]: X'X over samples and rows, with a column of ones behind the units.
        Several columns of one unit (query heads that share their values) give one matrix each."""
        layout = infer_probe_layout(probe, blocks * size)
        repeats = layout.repeats
        split = self.reshape(self.rows(probe, blocks * size), 0, -1, repeats, blocks, size)
        split = self.transpose(split, 2, 3, 0, 1, 4)
        ones = self.ones_of_shown(self.ones_column(split, self.row_mask(probe.tensor)), layout.is_shown(blocks))
        extended = self.node(op.CONCAT, [split, ones], axis=4)
        flat = self.reshape(extended, repeats, blocks, -1, size + 1)
        return self.node(op.MATMUL, [self.transpose(flat, 0, 1, 3, 2), flat])

    def gram_joint(self, probe: Probe, units: int, window: ir.Node | None, stride: int = 1) -> ir.Value:
        """X'X [units * columns + 1, the same] over samples and rows, packed, with a column of ones behind the units.
        The columns of one unit (the width of a head, the offsets at which ``window`` reads a channel) are adjacent.
        One row of every ``stride`` is taken, with that weight."""
        if window is None:
            repeats = infer_probe_layout(probe, units).repeats
            rows = self.rows(probe, units)
            if repeats > 1:
                rows = self.transpose(self.reshape(rows, 0, -1, repeats, units), 0, 1, 3, 2)
                rows = self.reshape(rows, 0, -1, units * repeats)
            mask, columns = self.row_mask(probe.tensor), repeats
        else:
            rows, mask, columns = self.convolution_patches(probe, window), None, math.prod(kernel_shape(window))
        extended = self.node(op.CONCAT, [rows, self.ones_column(rows, mask)], axis=2)
        flat = self.reshape(extended, -1, units * columns + 1)
        if stride == 1:
            return self.packed_gram(flat, units * columns + 1)
        gram = self.packed_gram(
            self.node(op.GATHER, [flat, self.sampled_rows(flat, stride)], axis=0), units * columns + 1
        )
        return self.node(op.MUL, [gram, self.constant(np.array(stride, np.float32))])

    def sampled_rows(self, flat: ir.Value, stride: int) -> ir.Value:
        """[rows / stride, rounded up]: a row number in each stretch of ``stride`` rows of ``flat`` [rows, size]. The
        place within the stretch goes in steps of the golden ratio: it keeps step with no pattern of the rows."""
        step, turn, count = self.integer(stride), self.integer(TURN), self.reshape(self.shape_slice(flat, 0, 1))
        stretches = self.node(op.DIV, [self.node(op.ADD, [count, self.integer(stride - 1)]), step])
        numbers = self.node(op.RANGE, [self.integer(0), stretches, self.integer(1)])
        turns = self.node(op.MOD, [self.node(op.MUL, [numbers, self.integer(GOLDEN)]), turn])
        places = self.node(op.DIV, [self.node(op.MUL, [turns, step]), turn])
        return self.node(op.MOD, [self.node(op.ADD, [self.node(op.MUL, [numbers, step]), places]), count])

    def packed_gram(self, flat: ir.Value, size: int) -> ir.Value:
        """X'X of rows [rows, size], packed as in ``packed_symmetric``."""
        transposed, parts = self.transpose(flat, 1, 0), []
        for start, stop in row_strips(size):
            left, right = transposed, flat
            if (start, stop) != (0, size):
                left = self.node(op.SLICE, [transposed, self.ints([start]), self.ints([stop]), self.ints([0])])
                right = self.node(op.SLICE, [flat, self.ints([start]), self.ints([size]), self.ints([1])])
            parts.append(self.reshape(self.node(op.MATMUL, [left, right]), -1))
        return parts[0] if len(parts) == 1 else self.node(op.CONCAT, parts, axis=0)

    def convolution_patches(self, probe: Probe, window: ir.Node) -> ir.Value:
        """[samples, rows, units * offsets]: what the convolution ``window`` reads at each position, by a depthwise
        convolution with one-hot kernels."""
        units = probe.units.reshape(-1)
        kernel = kernel_shape(window)
        taps = math.prod(kernel)
        order = np.argsort(units, kind="stable")
        order = order[units[order] >= 0]
        value = self.node(
            op.GATHER, [self.cast_float32(self.activation(probe.tensor)), self.ints(order.tolist())], axis=1
        )
        picks = np.tile(np.eye(taps, dtype=np.float32), (len(order), 1)).reshape(-1, 1, *kernel)
        self.count += 1
        inputs = [value, self.constant(picks)]
        name = f"snpc_measure_{self.count}"
        node = copy_node(window, inputs, name=name, outputs=[f"{name}_out"])
        node.attributes["group"] = ir.AttrInt64("group", len(order))
        self.model.graph.append(node)
        flat = self.reshape(node.outputs[0], 0, len(order) * taps, -1)
        return self.transpose(flat, 0, 2, 1)

    def block_gram(self, value: ir.Value, blocks: int, size: int) -> ir.Value:
        """[blocks, size, size]: X'X of each block of ``value`` [blocks, .., size]."""
        flat = self.reshape(value, blocks, -1, size)
        return self.node(op.MATMUL, [self.transpose(flat, 0, 2, 1), flat])

    def residual_error_sums(
        self, probe: Probe, size: int, value: str, dense: str, dtype: ir.DataType
    ) -> tuple[ir.Value, ir.Value]:
        """(sum of unit' error [1, size, D], sum of error [1, 1, D]), error = dense - value, over the rows of a probe
        that shows every unit once, along its last axis. ``dense`` names a new input of the type and shape of
        ``value``."""
        operands = [self.cast_float32(v) for v in (self.add_input(dense, dtype), self.values[value])]
        error = self.scale_rows(self.node(op.SUB, operands))
        flat = self.node(
            op.RESHAPE, [error, self.node(op.CONCAT, [self.ints([1, -1]), self.shape_slice(error, -1)], axis=0)]
        )
        mask = self.row_mask(probe.tensor)
        flat = self.zero_masked(flat, None if mask is None else self.reshape(mask, 1, -1, 1))
        rows = self.rows(probe, size)
        ones = self.reshape(self.ones_column(rows, mask), 1, 1, -1)
        units = self.reshape(self.rows_by_block(probe, 1, size), 1, -1, size)
        return self.node(op.MATMUL, [self.transpose(units, 0, 2, 1), flat]), self.node(op.MATMUL, [ones, flat])

    def max_attention(self, source: PaddingSource) -> ir.Value:
        """[batch, keys]: the largest attention weight of each key, over queries and heads."""
        value = self.cast_float32(self.values[str(source.value.name)])
        axis, rank = source.key_axis, source.rank
        if source.heads_on_axis:
            head = self.ints([-1, source.heads_on_axis])
            value = self.node(op.RESHAPE, [value, self.node(op.CONCAT, [head, self.shape_slice(value, 1)], axis=0)])
            axis, rank = axis + 1, rank + 1
        return self.reduce(op.REDUCE_MAX, value, [k for k in range(1, rank) if k != axis])


def kernel_shape(window: ir.Node) -> list[int]:
    """Sizes of a convolution's kernel."""
    weight = window.inputs[1]
    assert weight is not None and weight.shape is not None
    return [int(n) for n in weight.shape][2:]  # type: ignore[arg-type]


def probed_axis_size(probe: Probe, layout: ProbeLayout, axis: int) -> int:
    """The size of an axis that units vary on, after ``layout`` has split axis 0."""
    if layout.period:
        return layout.period if axis == 1 else int(probe.units.shape[axis - 1])
    return int(probe.units.shape[axis])
