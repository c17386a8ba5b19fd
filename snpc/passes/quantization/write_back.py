"""Writing back: the float graph, cut, becomes a graph on quantized values again, with the nodes that the file has.

Every node that became float is put back, with its constants cut, and what read the float value behind its output reads
that output again. Nodes that the cut has put in between stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import cached_property
from typing import Any

import onnx_ir as ir
from onnx_ir.passes import common

from snpc.errors import CheckFailed
from snpc.graph import attribute_values, copy_node, make_node, replace_graph_output, run_library_pass, unused_name
from snpc.ops import DEQUANTIZE_LINEAR, DYNAMIC_QUANTIZERS, QUANTIZE_LINEAR, Quantized, float_form
from snpc.passes.canonicalization import NameNodes
from snpc.passes.quantization.cut_constants import CutConstant
from snpc.passes.quantization.float_values import stored
from snpc.types import QuantizedForm


def write_back(form: QuantizedForm, whole: ir.Model, model: ir.Model, constants: Mapping[str, CutConstant]) -> ir.Model:
    """``model``, a cut of the float graph ``whole``, in place: with the quantized nodes of ``form``, on ``constants``.

    Raises CheckFailed where the cut has changed a node that cannot be put back.
    """
    writer = Writer(form, whole.graph, model.graph, constants)
    writer.put_constants_back()
    for node in form.graph.graph:
        if not writer.is_kept(node) and not writer.is_reader(node):
            writer.put_back(node)
    writer.connect()
    model.graph.sort()
    run_library_pass(common.RemoveUnusedNodesPass(), model)
    NameNodes()(model)  # what is put back may have the name of a float node that stays
    writer.check_all_back()
    return model


class ValueGone(Exception):
    """Raised for a value that the cut graph does not have any more, as parts of a packed projection are cut apart."""


class Writer:
    """Puts the nodes of ``form`` into ``graph``, a cut of the float graph ``whole``."""

    def __init__(
        self, form: QuantizedForm, whole: ir.Graph, graph: ir.Graph, constants: Mapping[str, CutConstant]
    ) -> None:
        self.form, self.graph, self.constants = form, graph, constants
        self.before = {str(node.name): node for node in whole}
        self.float_names = {before: name for name, before in form.nodes.items()}
        self.nodes = {str(node.name): node for node in graph}
        self.floats = {str(v.name): v for v in (*graph.inputs, *(v for node in graph for v in node.outputs))}
        self.replaced = dict(self.find_replaced())
        self.outputs: dict[str, ir.Value] = {}
        self.wrapped: dict[str, ir.Value] = {}
        self.float_codes: dict[str, ir.Value] = {}
        self.gone: set[str] = set()
        self.held: dict[tuple[str, object], ir.Value] = {}
        self.places = {
            (node, index): (name, part)
            for name in constants
            for part, node, index in constants[name].constant.places
            if name in form.constants
        }

    def find_replaced(self) -> Iterator[tuple[str, ir.Value]]:
        """(float value, what all of its readers read now instead): the sum with a new bias, or a part of its own."""
        for value in (v for node in self.before.values() for v in node.outputs):
            readers = [(self.nodes.get(str(node.name)), index) for node, index in value.uses()]
            read = {node.inputs[index] for node, index in readers if node is not None and node.graph is self.graph}
            now = read.pop() if len(read) == 1 else None
            if now is not None and now.name != value.name:
                yield str(value.name), now

    def is_kept(self, node: ir.Node) -> bool:
        """Whether the float graph has a stored node too."""
        return str(node.name) in self.float_names

    def is_new(self, node: ir.Node) -> bool:
        """Whether the cut has added a node."""
        return str(node.name) not in self.form.made

    # -- constants ---------------------------------------------------------------------------------------------------

    def is_reader(self, node: ir.Node) -> bool:
        """Whether a stored node only makes floats of a constant."""
        form = float_form(node.domain, node.op_type)
        is_float = form is not None and form.op is None
        return is_float and self.form.values.get(str(node.outputs[0].name)) in self.form.constants

    def put_constants_back(self) -> None:
        """A node that makes floats of codes in place of each float constant that had one."""
        stored_nodes = {str(node.name): node for node in self.form.graph.graph}
        for name, cut in self.constants.items():
            if not cut.constant.reader:
                continue
            reader, value = stored_nodes[cut.constant.reader], self.graph.initializers[name]
            places = {index: part for part, node, index in cut.constant.places if node == cut.constant.reader}
            inputs = [None if v is None else self.part(name, places[k]) for k, v in enumerate(reader.inputs)]
            node = copy_node(reader, inputs, name=str(reader.name), outputs=[f"{name}_dequantized"])
            node.attributes.update({a.name: a for a in ir.convenience.convert_attributes(cut.attributes)})
            self.graph.insert_before(self.graph[0], node)
            value.replace_all_uses_with(node.outputs[0])
            self.outputs[name] = node.outputs[0]

    def part(self, name: str, part: str) -> ir.Value:
        """The initializer with a part of a constant."""
        cut = self.constants[name]
        label = cut.constant.parts[part]
        before, array = self.form.graph.graph.initializers[label], cut.parts.get(part)
        if array is None:
            return self.initializer(before)
        key = (label, array.tobytes() if array.size < 4096 else id(array))
        if key not in self.held:
            tensor = stored(before)
            assert tensor is not None
            dtype = tensor.dtype
            lazy = ir.LazyTensor(
                lambda: ir.Tensor(array, dtype=dtype), dtype, ir.Shape(array.shape), name=label, cache=True
            )
            self.held[key] = self.register(before, lazy)
        return self.held[key]

    def initializer(self, before: ir.Value) -> ir.Value:
        """The constant of the stored graph as it is in this one: as the cut has left it where both have it."""
        present = self.graph.initializers.get(str(before.name))
        key = (str(before.name), None)
        if key not in self.held and present is not None and not any(v is present for v in self.held.values()):
            return present
        if key not in self.held:
            assert before.const_value is not None
            self.held[key] = self.register(before, before.const_value)
        return self.held[key]

    def register(self, before: ir.Value, tensor: ir.TensorProtocol) -> ir.Value:
        """A new initializer after one of the stored graph, and of its family where that is a copy."""
        name = unused_name(str(before.name), self.graph.initializers)
        shape = ir.Shape(tuple(int(n) for n in tensor.shape))  # type: ignore[arg-type]
        value = ir.Value(name=name, const_value=tensor, shape=shape, type=ir.TensorType(tensor.dtype))
        if name == before.name:
            value.meta.update(before.meta)
        self.graph.register_initializer(value)
        return value

    # -- nodes -------------------------------------------------------------------------------------------------------

    def put_back(self, node: ir.Node) -> None:
        """A copy of a stored node; none where what it reads is gone, which its float node shows if it is needed."""
        names = [str(v.name) for v in node.outputs]
        try:
            inputs = [self.input(node, index) for index in range(len(node.inputs))]
        except ValueGone:
            self.gone.update(names)
            return
        clone = copy_node(node, inputs, name=str(node.name), outputs=names)
        clone.attributes.update({a.name: a for a in ir.convenience.convert_attributes(self.new_attributes(node))})
        self.graph.append(clone)
        self.outputs |= dict(zip(names, clone.outputs, strict=True))

    def stand_in(self, node: ir.Node) -> ir.Node | None:
        """The float node in the place of a stored one."""
        return self.nodes.get(self.form.stand_ins.get(str(node.name), ""))

    def new_attributes(self, node: ir.Node) -> dict[str, Any]:
        """Attributes of a stored node that the cut has changed."""
        stand_in, form = self.stand_in(node), float_form(node.domain, node.op_type)
        own: Mapping[str, Any] = attribute_values(node)
        found: dict[str, Any] = {}
        if stand_in is not None:
            given = attribute_values(stand_in)
            keep = {name: name for name in own} if form is None or form.keep is None else form.keep
            found = {old: given[new] for old, new in keep.items() if new in given and given[new] != own.get(old)}
        for index in range(len(node.inputs)):
            name, _ = self.places.get((str(node.name), index), ("", ""))
            if name:
                found |= self.constants[name].attributes
        return found

    def input(self, node: ir.Node, index: int) -> ir.Value | None:
        """What a stored node reads now."""
        value, place = node.inputs[index], self.places.get((str(node.name), index))
        if value is None or place is not None:
            return None if value is None or place is None else self.part(*place)
        stand_in = self.stand_in(node)
        moves = stand_in is not None and (stand_in.domain, stand_in.op_type) == (node.domain, node.op_type)
        if moves and stand_in is not None and str(value.name) not in self.form.quantized and index:
            return stand_in.inputs[index]
        if value.is_initializer():
            return self.initializer(value)
        if str(node.name) in self.form.stand_ins and stand_in is None:
            raise ValueGone
        try:
            return self.value(value)
        except ValueGone:
            return self.rounded_again(node, index)

    def rounded_again(self, node: ir.Node, index: int) -> ir.Value:
        """The codes that a stored node reads, made of what its float node reads, where their source is gone."""
        stand_in, form = self.stand_in(node), float_form(node.domain, node.op_type)
        operands = () if form is None else form.operands_of(len(node.inputs))
        for operand, value in zip(operands, () if stand_in is None else stand_in.inputs, strict=False):
            if (
                isinstance(operand, Quantized)
                and operand.data == index
                and operand.scale is not None
                and value is not None
            ):
                scaling = [self.input(node, k) for k in (operand.scale, operand.zero_point)]
                label = f"{node.name}_{index}_rounded"
                made = make_node(QUANTIZE_LINEAR, [value, *scaling], name=label, outputs=[label])
                self.graph.append(made)
                return made.outputs[0]
        raise ValueGone

    def value(self, value: ir.Value) -> ir.Value:
        """What a stored value is now: with the bias behind it, if there is a new one."""
        name, producer = str(value.name), value.producer()
        if producer is None or self.is_kept(producer):
            return self.kept_value(value)
        if self.is_reader(producer):
            return self.outputs[self.form.values[name]]
        if name in self.gone:
            raise ValueGone
        if is_conversion(producer):
            return self.outputs[name]
        stand_in = self.stand_in(producer)
        if name in self.form.quantized and stand_in is not None:
            made = str(stand_in.outputs[value.index() or 0].name)
            return self.with_bias(value, made) if made in self.replaced else self.outputs[name]
        return self.replaced.get(self.form.values.get(name, ""), self.outputs[name])

    def kept_value(self, value: ir.Value) -> ir.Value:
        """An input, or an output of a node that the float graph has too, which may have got another name there."""
        name, producer = str(value.name), value.producer()
        if producer is not None:
            name = str(self.before[self.float_names[str(producer.name)]].outputs[value.index() or 0].name)
        found = self.replaced.get(name) or self.floats.get(name)
        if found is None:
            raise ValueGone
        return found

    def with_bias(self, value: ir.Value, made: str) -> ir.Value:
        """Codes to which a bias is added as floats, since their node has none. ``made``: the float value behind
        them."""
        name = str(value.name)
        if name not in self.wrapped:
            floats = self.floats_of(value)
            (add, index), *_ = self.floats[made].uses()
            add.replace_input_with(index, floats)
            label = f"{name}_biased"
            again = make_node(QUANTIZE_LINEAR, [add.outputs[0], *self.scaling(value)], name=label, outputs=[label])
            self.graph.append(again)
            self.wrapped[name] = again.outputs[0]
        return self.wrapped[name]

    def floats_of(self, value: ir.Value) -> ir.Value:
        """Codes that a node on quantized values makes, as floats."""
        name = str(value.name)
        if name not in self.float_codes:
            label = f"{name}_as_float"
            codes = [self.outputs[name], *self.scaling(value)]
            node = make_node(DEQUANTIZE_LINEAR, codes, name=label, outputs=[label])
            self.graph.append(node)
            self.float_codes[name] = node.outputs[0]
        return self.float_codes[name]

    def scaling(self, value: ir.Value) -> list[ir.Value | None]:
        """Scale and zero point of the codes that a stored node makes."""
        node, clone = value.producer(), self.outputs[str(value.name)].producer()
        form = None if node is None else float_form(node.domain, node.op_type)
        if form is None or form.output is None or clone is None:
            raise ValueGone
        return [clone.inputs[index] for index in form.output]

    # -- edges -------------------------------------------------------------------------------------------------------

    @cached_property
    def converted(self) -> dict[str, ir.Value]:
        """Float value -> the stored one that is the same, rounded."""
        twins: dict[str, ir.Value] = {}
        for node in self.form.graph.graph:
            if not self.is_kept(node) and is_conversion(node) and not self.is_reader(node):
                twins |= {
                    self.form.values[str(v.name)]: v
                    for v in node.outputs
                    if str(v.name) in self.form.values and str(v.name) not in self.form.quantized
                }
        return twins

    @cached_property
    def codes(self) -> dict[str, ir.Value]:
        """Float value -> the stored codes that a node on quantized values makes for it."""
        found: dict[str, ir.Value] = {}
        for node in self.form.graph.graph:
            if str(node.name) in self.form.stand_ins and not self.is_kept(node):
                made = (v for v in node.outputs if str(v.name) in self.form.quantized and str(v.name) in self.outputs)
                found |= {self.form.values[str(v.name)]: v for v in made}
        return found

    def connect(self) -> None:
        """Let float nodes and outputs read what they read in the file."""
        present = list(self.graph)
        twins = {str(node.name): node for node in self.form.graph.graph}
        for name, before in self.form.nodes.items():
            node = self.nodes.get(name)
            for index, value in enumerate(twins[before].inputs):
                if node is not None and node.graph is self.graph and self.is_converted(value):
                    self.redirect(node, index, value)
        for node in present:
            if self.is_new(node) and str(node.name) in self.nodes:
                self.reconnect_new(node)
        for name, clone in list(self.outputs.items()):
            made = self.floats.get(self.form.values.get(name, ""))
            if made is not None and name not in self.form.quantized and not self.is_conversion_output(clone):
                if made.is_graph_output():
                    self.replace_output(made, clone)
                made.replace_all_uses_with(clone)
        self.connect_outputs()

    def is_converted(self, value: ir.Value | None) -> bool:
        """Whether a stored value is another one, rounded."""
        producer = None if value is None else value.producer()
        if producer is None or self.is_kept(producer) or self.is_reader(producer):
            return False
        return is_conversion(producer)

    def is_conversion_output(self, value: ir.Value) -> bool:
        producer = value.producer()
        return producer is None or is_conversion(producer)

    def redirect(self, node: ir.Node, index: int, value: ir.Value | None) -> None:
        """Let an input that reads the float value behind ``value``, perhaps through new nodes, read ``value``."""
        assert value is not None
        behind = self.form.values[str(value.name)]
        wanted = {behind, str(self.replaced[behind].name)} if behind in self.replaced else {behind}
        stack: list[tuple[ir.Node, int]] = [(node, index)]
        while stack:
            reader, at = stack.pop()
            read = reader.inputs[at] if at < len(reader.inputs) else None
            if read is None:
                continue
            if read.name in wanted:
                with suppress(ValueGone):
                    reader.replace_input_with(at, self.value(value))
                continue
            producer = read.producer()
            if producer is not None and self.is_new(producer) and str(producer.name) in self.nodes:
                stack += [(producer, k) for k in range(len(producer.inputs))]

    def reconnect_new(self, node: ir.Node) -> None:
        """A node that the cut has added for others that are gone."""
        for index, read in enumerate(node.inputs):
            name = "" if read is None else str(read.name)
            if self.replaced.get(name) is node.outputs[0]:
                continue
            with suppress(ValueGone):
                if name in self.converted:
                    node.replace_input_with(index, self.value(self.converted[name]))
                elif name in self.codes:
                    node.replace_input_with(index, self.floats_of(self.codes[name]))

    def connect_outputs(self) -> None:
        """Outputs of the graph that quantized nodes give."""
        for index, before in enumerate(self.form.graph.graph.outputs):
            producer = before.producer()
            if producer is None or self.is_kept(producer):
                continue
            try:
                old, new = self.graph.outputs[index], self.value(before)
            except ValueGone:
                raise left_float(producer) from None
            if new is not old:
                self.replace_output(old, new)

    def replace_output(self, old: ir.Value, new: ir.Value) -> None:
        """``new`` is the output of the graph that ``old`` was."""
        new.type, new.shape = old.type, old.shape
        replace_graph_output(self.graph, old, new, f"{old.name}_float")

    def check_all_back(self) -> None:
        """Raise CheckFailed where a float node is left in the place of one that computes with codes. Nodes that only
        move them may move floats."""
        for node in self.form.graph.graph:
            stand_in = self.stand_in(node)
            if stand_in is not None and stand_in.graph is self.graph and float_form(node.domain, node.op_type):
                raise left_float(stand_in)


def left_float(node: ir.Node) -> CheckFailed:
    """The error about a node that does not get its codes back."""
    return CheckFailed(
        f"{node.op_type} {node.name} cannot be written quantized after this cut; try --uniform, or --dequantize, which "
        "takes the float model"
    )


def is_conversion(node: ir.Node) -> bool:
    """Whether a node rounds its input, or makes floats of codes."""
    form = float_form(node.domain, node.op_type)
    return (node.domain, node.op_type) in DYNAMIC_QUANTIZERS or (form is not None and form.op is None)
