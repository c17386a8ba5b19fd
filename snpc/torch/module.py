"""An ONNX graph as a torch module: its weights are parameters under their own names, and gradients flow.

Every node becomes an instruction, run by its implementation in ``snpc.torch.operators``. Values that depend on shapes
and constants only (the arithmetic that exporters write around a Reshape, causal masks, positions) are computed once for
every combination of input shapes. They are the constants of a program, so that a training step runs the layers only.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
import torch

from snpc.errors import UserError
from snpc.graph import attribute_values, opset_version
from snpc.ops import is_quantized_operator
from snpc.passes.canonicalization import original_name
from snpc.runtime.io import load, refuse_branches
from snpc.torch.operators import Implementation, OperatorCall, Result, Tensor, find_implementation, to_tensor
from snpc.torch.trainable_weights import find_ties, trainable_names
from snpc.types import Model

MAX_PROGRAMS = 16  # programs are kept for this many combinations of input shapes

WeightTransform = Callable[[Tensor], Tensor]
ProgramKey = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Instruction:
    """A node: its implementation, and the names of its inputs (None: left out) and outputs."""

    name: str
    call: OperatorCall
    implementation: Implementation
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    domain: str = ""


@dataclass(frozen=True)
class Program:
    """What to run for inputs of certain shapes: instructions, and the constants and integers that they take."""

    instructions: tuple[Instruction, ...]
    constants: dict[str, Tensor]
    integers: dict[str, tuple[int, ...]]


class GraphModule(torch.nn.Module):
    """A loaded model as a module. ``watch``: names of activations to return besides the outputs.

    ``module(feeds)`` takes tensors by input name and returns tensors by output name. ``module(a, b)`` takes the inputs
    in their order and returns the output, or a tuple of outputs. Raises UserError for an operator that has no
    implementation.
    """

    def __init__(self, model: Model, *, watch: Sequence[str] = ()) -> None:
        super().__init__()
        graph = model.graph.graph
        self.input_names = tuple(spec.name for spec in model.inputs)
        self.output_names = tuple(dict.fromkeys([*(spec.name for spec in model.outputs), *watch]))
        self.instructions = tuple(compile_instructions(model.graph, required_nodes(graph, self.output_names)))
        activations = {name for instruction in self.instructions for name in instruction.outputs}
        known_names = activations | set(self.input_names) | set(graph.initializers)
        for name in watch:
            if name not in known_names:
                raise UserError(f"{model.path}: there is no activation {name} to watch")
        self.parameter_paths: dict[str, str] = {}
        """Initializer (its name in the file) -> path of its parameter: the same name wherever torch allows it."""
        self.origins: dict[str, str] = {name: original_name(v) for name, v in graph.initializers.items()}
        """Initializer of the canonicalized graph -> the one in the file that it is a copy of."""
        self.programs: OrderedDict[ProgramKey, Program] = OrderedDict()
        self.weight_transforms: Mapping[str, tuple[WeightTransform, ...]] = {}
        """Initializer of the graph -> functions that its weight passes through before it is used."""
        self.interceptor: Callable[[Instruction, Sequence[Any]], Result] | None = None
        """Runs instructions instead of their own implementations, where it is set."""
        names = trainable_names(model.graph)
        self.ties = find_ties(model.graph, names)
        for name in names:
            if name not in self.ties:
                self.register(name, to_tensor(initializer_array(graph, name)), trains=True)
        for name in dict.fromkeys(self.origins.values()):
            if name not in self.parameter_paths and name not in self.ties:
                self.register(name, to_tensor(initializer_array(graph, name)), trains=False)
        weights = set(self.weight_names())
        self.full_precision = weight_free_instructions(
            self.instructions, {name for name, owner in self.origins.items() if owner in weights}
        )
        """Names of instructions that depend on no weight, such as rotary angles: never in low precision."""

    def register(self, name: str, tensor: Tensor, *, trains: bool) -> None:
        """Register a tensor under its ONNX name: dots make submodules, as in torch. A name that torch cannot have is
        spelled with middle dots."""
        for path in (name, name.replace(".", "·"), f"weight·{name.replace('.', '·')}"):
            *parents, last = path.split(".")
            namespace = self.namespace(parents)
            if namespace is not None and last and not hasattr(namespace, last):
                break
        assert namespace is not None
        if trains:
            namespace.register_parameter(last, torch.nn.Parameter(tensor))
        else:
            namespace.register_buffer(last, tensor, persistent=False)
        self.parameter_paths[name] = path

    def namespace(self, parents: Iterable[str]) -> torch.nn.Module | None:
        """The submodule at a path, created where it does not exist; None where torch cannot have it."""
        module: torch.nn.Module = self
        for parent in parents:
            if not parent or not isinstance(getattr(module, parent, ParameterNamespace()), ParameterNamespace):
                return None
            if parent not in module._modules:
                module.add_module(parent, ParameterNamespace())
            module = module._modules[parent]  # type: ignore[assignment]
        return module

    def weight(self, name: str) -> Tensor:
        """The parameter or constant with this name in the file. Of one that is tied to another: a view of that one."""
        owner, transposed = self.ties.get(name, (name, False))
        value: Any = self
        for part in self.parameter_paths[owner].split("."):
            value = getattr(value, part)
        tensor: Tensor = value.mT if transposed else value
        return tensor

    def owner(self, name: str) -> tuple[str, bool]:
        """(parameter, whether its transpose is used) behind a constant of the graph."""
        origin = self.origins[name]
        return self.ties.get(origin, (origin, False))

    def weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name in the file, parameter) of everything that trains; tied weights once."""
        for name in self.parameter_paths:
            weight = self.weight(name)
            if isinstance(weight, torch.nn.Parameter):
                yield name, weight

    def weight_names(self) -> Iterator[str]:
        """Names in the file of everything that trains, tied weights included."""
        yield from (name for name, _ in self.weights())
        yield from self.ties

    def forward(self, *args: Any, **named: Tensor) -> Any:
        if len(args) == 1 and isinstance(args[0], Mapping):
            return self.run(dict(args[0]))
        outputs = self.run({**dict(zip(self.input_names, args, strict=False)), **named})
        values = tuple(outputs[name] for name in self.output_names)
        return values[0] if len(values) == 1 else values

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Outputs by name. The first call with new input shapes records a program, later ones run it."""
        missing = [name for name in self.input_names if name not in feeds]
        if missing:
            raise UserError(f"the model takes {', '.join(self.input_names)}: {', '.join(missing)} is missing")
        feeds = {name: feeds[name] for name in self.input_names}
        key = tuple((name, tuple(x.shape), x.dtype) for name, x in feeds.items())
        first = next((p for _, p in self.weights()), torch.empty(0))
        key = (*key, (str(first.device), (), first.dtype))
        program = self.programs.get(key)
        if program is None:
            return self.record(key, feeds)  # type: ignore[no-any-return]
        values: dict[str, Tensor] = {**feeds, **program.constants}
        for instruction in program.instructions:
            self.execute(instruction, self.arguments(instruction, values, program.integers), values)
        return {name: self.value(name, values) for name in self.output_names}

    def value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        """A computed value, else the constant of that name with its transforms applied."""
        value = values.get(name)
        if value is None:
            value = self.weight(self.origins[name])
            for transform in self.weight_transforms.get(name, ()):
                value = transform(value)
        return value

    def arguments(
        self, instruction: Instruction, values: Mapping[str, Tensor], integers: Mapping[str, tuple[int, ...]]
    ) -> list[Any]:
        arguments: list[Any] = []
        for index, name in enumerate(instruction.inputs):
            if name is None:
                arguments.append(None)
            elif index in instruction.implementation.integer_inputs:
                known = integers.get(name)
                arguments.append(to_integers(self.value(name, values)) if known is None else known)
            else:
                arguments.append(self.value(name, values))
        return arguments

    def execute(self, instruction: Instruction, arguments: Sequence[Any], values: dict[str, Tensor]) -> None:
        """Run an instruction, without autocast where it is exact, and add what it computes to ``values``."""
        device_type = next((x.device.type for x in arguments if isinstance(x, torch.Tensor)), "cpu")
        if instruction.name in self.full_precision and torch.is_autocast_enabled(device_type):
            with torch.autocast(device_type, enabled=False):
                run_instruction(instruction, arguments, values, self.interceptor)
        else:
            run_instruction(instruction, arguments, values, self.interceptor)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record(self, key: ProgramKey, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run every instruction, and keep as a program those whose values differ between inputs of these shapes."""
        weights = set(self.weight_names())
        values: dict[str, Tensor] = dict(feeds)
        fixed = {name for name, owner in self.origins.items() if owner not in weights}
        data_dependent: set[str] = set()
        kept = []
        device = next((x.device for x in (*feeds.values(), *self.parameters()) if x.device.type != "cpu"), None)
        for instruction in self.instructions:
            names = [name for name in instruction.inputs if name is not None]
            for name in names:
                if name in fixed and device is not None:
                    values[name] = self.value(name, values)
            arguments = self.arguments(instruction, values, {})
            if len(names) > 1:
                arguments = [to_device(x, device) for x in arguments]
            self.execute(instruction, arguments, values)
            if has_data_dependent_shape(instruction, fixed, data_dependent):
                data_dependent |= set(instruction.outputs)
            reads_shape = instruction.implementation.reads == "shape" and not data_dependent.intersection(names)
            if reads_shape or all(name in fixed for name in names):
                fixed |= set(instruction.outputs)
            else:
                kept.append(instruction)
        self.programs[key] = self.make_program(kept, values, fixed, device)
        if len(self.programs) > MAX_PROGRAMS:
            self.programs.popitem(last=False)
        return {name: self.value(name, values) for name in self.output_names}

    def make_program(
        self,
        instructions: Sequence[Instruction],
        values: Mapping[str, Tensor],
        fixed: set[str],
        device: torch.device | None,
    ) -> Program:
        """The program of these instructions, with the ``fixed`` values that they take as its constants."""
        constants: dict[str, Tensor] = {}
        integers: dict[str, tuple[int, ...]] = {}
        for instruction in instructions:
            for index, name in enumerate(instruction.inputs):
                if name is None or name not in fixed:
                    continue
                value = self.value(name, values)
                if index in instruction.implementation.integer_inputs:
                    integers[name] = to_integers(value)
                else:
                    constants[name] = to_device(value.detach(), device)
        for name in self.output_names:
            if name in fixed:
                constants[name] = self.value(name, values).detach()
        return Program(tuple(instructions), constants, integers)


def load_graph_module(path: str | os.PathLike[str], *, watch: Sequence[str] = ()) -> GraphModule:
    """An ONNX file as a module with trainable weights. Raises UserError for an operator without a torch
    implementation."""
    model = load(path)
    refuse_branches(model, "training")
    return GraphModule(model, watch=watch)


class ParameterNamespace(torch.nn.Module):
    """Holds the parameters whose names begin with the same part up to a dot."""


def to_device(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if device is not None and isinstance(value, torch.Tensor) else value


def to_integers(value: Tensor) -> tuple[int, ...]:
    return tuple(int(n) for n in value.reshape(-1).tolist())


def has_data_dependent_shape(instruction: Instruction, fixed: set[str], data_dependent: set[str]) -> bool:
    """Can the shapes of its outputs differ between inputs of the same shapes? ``fixed``: names of values that are the
    same for all such inputs; ``data_dependent``: of those whose shapes are not."""
    names = [name for name in instruction.inputs if name is not None]
    if data_dependent.intersection(names):
        return True
    implementation = instruction.implementation
    if implementation.data_dependent_shape:
        return not all(name in fixed for name in names)
    sizes = [instruction.inputs[k] for k in implementation.integer_inputs if k < len(instruction.inputs)]
    return any(name is not None and name not in fixed for name in sizes)


def run_instruction(
    instruction: Instruction,
    arguments: Sequence[Any],
    values: dict[str, Tensor],
    interceptor: Callable[[Instruction, Sequence[Any]], Result] | None = None,
) -> None:
    """Add the outputs to ``values``. Raises UserError where the implementation does not cover the node's attributes."""
    call = instruction.call
    try:
        if interceptor is not None:
            result = interceptor(instruction, arguments)
        else:
            result = instruction.implementation.run(call, *arguments)
    except AssertionError as error:
        raise UserError(f"{instruction.name} ({call.op}): {error}: it cannot be trained through here") from None
    outputs = result if isinstance(result, tuple) else (result,)
    for name, value in zip(instruction.outputs, outputs, strict=False):
        if name:
            values[name] = value


def initializer_array(graph: ir.Graph, name: str) -> Any:
    value = graph.initializers.get(name) or next(v for v in graph.initializers.values() if original_name(v) == name)
    assert value.const_value is not None
    return value.const_value.numpy()


def required_nodes(graph: ir.Graph, outputs: Sequence[str]) -> list[ir.Node]:
    """The nodes that the outputs depend on, in order."""
    required = set(outputs)
    nodes = []
    for node in reversed(list(graph)):
        if any(value.name in required for value in node.outputs):
            nodes.append(node)
            required |= {str(value.name) for value in node.inputs if value is not None}
    return nodes[::-1]


def weight_free_instructions(instructions: Sequence[Instruction], weights: set[str]) -> frozenset[str]:
    """Names of the instructions that depend on no weight."""
    dependent = set(weights)
    independent = set()
    for instruction in instructions:
        if dependent.isdisjoint(name for name in instruction.inputs if name is not None):
            independent.add(instruction.name)
        else:
            dependent |= set(instruction.outputs)
    return frozenset(independent)


def compile_instructions(model: ir.Model, nodes: Sequence[ir.Node]) -> Iterator[Instruction]:
    """Raises UserError for a node without an implementation, and for one with a subgraph."""
    for node in nodes:
        implementation = find_implementation(node.domain, node.op_type)
        subgraphs = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
        if implementation is None or any(a.type in subgraphs for a in node.attributes.values()):
            label = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            advice = "export it without that operator, or train it where it came from"
            if is_quantized_operator(node.domain, node.op_type):
                advice = "give its float model: snpc dequantize FILE -o float.onnx"
            raise UserError(
                f"{node.name}: there is no torch implementation of {label}, so this model cannot be trained here; "
                + advice
            )
        inputs = tuple(None if v is None else str(v.name) for v in node.inputs)
        outputs = tuple(str(v.name) for v in node.outputs)
        call = OperatorCall(node.op_type, opset_version(model, node.domain), attribute_values(node), len(outputs))
        yield Instruction(str(node.name), call, implementation, inputs, outputs, node.domain)
