"""An ONNX graph as a torch module: its weights are parameters under their own names, and gradients flow.

Every node is executed by the function that ``operators`` has for it. What depends on nothing but shapes and constants
(the arithmetic that exporters write around a Reshape, causal masks, positions) is computed once for every combination
of input shapes and kept, so that a step of training runs the layers only.
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
from snpc.graph.shapes import attribute_values, opset_version
from snpc.passes.canonicalization.shared_constants import original_name
from snpc.runtime.io.load import load
from snpc.torch.operators import Implementation, OperatorCall, find_implementation
from snpc.torch.operators.registry import Result, Tensor, to_tensor
from snpc.torch.trainable_weights import find_ties, trainable_names
from snpc.types import Model

MAX_PROGRAMS = 16  # of so many combinations of input shapes the constants are kept

WeightTransform = Callable[[Tensor], Tensor]
ProgramKey = tuple[tuple[str, tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Instruction:
    """One node: what runs it, the names of its inputs (None: left out) and outputs."""

    name: str
    call: OperatorCall
    implementation: Implementation
    inputs: tuple[str | None, ...]
    outputs: tuple[str, ...]
    domain: str = ""


@dataclass(frozen=True)
class Program:
    """What is left to do for inputs of certain shapes: steps, and values that are known."""

    instructions: tuple[Instruction, ...]
    constants: dict[str, Tensor]
    integers: dict[str, tuple[int, ...]]


class GraphModule(torch.nn.Module):
    """A model that snpc loaded, as a module. ``watch`` names activations to be given out besides the outputs.

    ``module(feeds)``, with tensors by input name, gives tensors by output name; ``module(a, b)``, with the inputs in
    their order, gives the output, or a tuple of them. Raises UserError for an operator that has no implementation.
    """

    def __init__(self, model: Model, *, watch: Sequence[str] = ()) -> None:
        super().__init__()
        graph = model.graph.graph
        self.input_names = tuple(spec.name for spec in model.inputs)
        self.output_names = tuple(dict.fromkeys([*(spec.name for spec in model.outputs), *watch]))
        self.instructions = tuple(compile_instructions(model.graph, required_nodes(graph, self.output_names)))
        made = (
            {name for step in self.instructions for name in step.outputs}
            | set(self.input_names)
            | set(graph.initializers)
        )
        for name in watch:
            if name not in made:
                raise UserError(f"{model.path}: there is no activation {name} to watch")
        self.parameter_paths: dict[str, str] = {}
        """Initializer (as the file names it) -> name of its parameter, which is the same wherever torch allows it."""
        self.origins: dict[str, str] = {name: original_name(v) for name, v in graph.initializers.items()}
        self.programs: OrderedDict[ProgramKey, Program] = OrderedDict()
        self.weight_transforms: Mapping[str, tuple[WeightTransform, ...]] = {}
        """What is done to weights (as the graph names them) before they are used."""
        self.interceptor: Callable[[Instruction, Sequence[Any]], Result] | None = None
        """Runs the steps in place of their own implementations."""
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
        """Names of steps whose inputs no weight has met, such as rotary angles: never in low precision."""

    def register(self, name: str, tensor: Tensor, *, trains: bool) -> None:
        """Register a tensor under its ONNX name: dots make submodules, as in torch; names that torch cannot have are
        spelled with middle dots."""
        for path in (name, name.replace(".", "·"), f"weight·{name.replace('.', '·')}"):
            *folders, last = path.split(".")
            holder = self.namespace(folders)
            if holder is not None and last and not hasattr(holder, last):
                break
        assert holder is not None
        if trains:
            holder.register_parameter(last, torch.nn.Parameter(tensor))
        else:
            holder.register_buffer(last, tensor, persistent=False)
        self.parameter_paths[name] = path

    def namespace(self, folders: Iterable[str]) -> torch.nn.Module | None:
        here: torch.nn.Module = self
        for folder in folders:
            if not folder or not isinstance(getattr(here, folder, ParameterNamespace()), ParameterNamespace):
                return None
            if folder not in here._modules:
                here.add_module(folder, ParameterNamespace())
            here = here._modules[folder]  # type: ignore[assignment]
        return here

    def weight(self, name: str) -> Tensor:
        """The parameter or constant with this name in the file; of one that is tied to another, a view of that."""
        owner, turned = self.ties.get(name, (name, False))
        here: Any = self
        for part in self.parameter_paths[owner].split("."):
            here = getattr(here, part)
        found: Tensor = here.mT if turned else here
        return found

    def owner(self, name: str) -> tuple[str, bool]:
        """(parameter, is its transpose used?) behind a constant as the graph names it."""
        found = self.origins[name]
        return self.ties.get(found, (found, False))

    def weights(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """(name in the file, parameter) of everything that trains; tied ones once."""
        for name in self.parameter_paths:
            found = self.weight(name)
            if isinstance(found, torch.nn.Parameter):
                yield name, found

    def forward(self, *args: Any, **named: Tensor) -> Any:
        if len(args) == 1 and isinstance(args[0], Mapping):
            return self.run(dict(args[0]))
        found = self.run({**dict(zip(self.input_names, args, strict=False)), **named})
        values = tuple(found[name] for name in self.output_names)
        return values[0] if len(values) == 1 else values

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
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
        for step in program.instructions:
            self.execute(step, self.arguments(step, values, program.integers), values)
        return {name: self.value(name, values) for name in self.output_names}

    def value(self, name: str, values: Mapping[str, Tensor]) -> Tensor:
        found = values.get(name)
        if found is None:
            found = self.weight(self.origins[name])
            for change in self.weight_transforms.get(name, ()):
                found = change(found)
        return found

    def arguments(
        self, step: Instruction, values: Mapping[str, Tensor], integers: Mapping[str, tuple[int, ...]]
    ) -> list[Any]:
        found: list[Any] = []
        for index, name in enumerate(step.inputs):
            if name is None:
                found.append(None)
            elif index in step.implementation.integer_inputs:
                found.append(integers[name] if name in integers else to_integers(self.value(name, values)))
            else:
                found.append(self.value(name, values))
        return found

    def execute(self, step: Instruction, arguments: Sequence[Any], values: dict[str, Tensor]) -> None:
        kind = next((x.device.type for x in arguments if isinstance(x, torch.Tensor)), "cpu")
        if step.name in self.full_precision and torch.is_autocast_enabled(kind):
            with torch.autocast(kind, enabled=False):
                run_instruction(step, arguments, values, self.interceptor)
        else:
            run_instruction(step, arguments, values, self.interceptor)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def record(self, key: ProgramKey, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run everything, and keep what will be the same for all inputs of these shapes."""
        weights = set(self.weight_names())
        values: dict[str, Tensor] = dict(feeds)
        fixed = {name for name, owner in self.origins.items() if owner not in weights}
        loose: set[str] = set()
        steps = []
        device = next((x.device for x in (*feeds.values(), *self.parameters()) if x.device.type != "cpu"), None)
        for step in self.instructions:
            given = [name for name in step.inputs if name is not None]
            for name in given:
                if name in fixed and device is not None:
                    values[name] = self.value(name, values)
            arguments = self.arguments(step, values, {})
            self.execute(step, [to_device(x, device) for x in arguments] if len(given) > 1 else arguments, values)
            if has_data_dependent_shape(step, fixed, loose):
                loose |= set(step.outputs)
            if (step.implementation.reads == "shape" and not loose.intersection(given)) or all(
                name in fixed for name in given
            ):
                fixed |= set(step.outputs)
            else:
                steps.append(step)
        self.programs[key] = self.make_program(steps, values, fixed, device)
        if len(self.programs) > MAX_PROGRAMS:
            self.programs.popitem(last=False)
        return {name: self.value(name, values) for name in self.output_names}

    def weight_names(self) -> Iterator[str]:
        yield from (name for name, _ in self.weights())
        yield from self.ties

    def make_program(
        self, steps: list[Instruction], values: Mapping[str, Tensor], fixed: set[str], device: torch.device | None
    ) -> Program:
        known: dict[str, Tensor] = {}
        integers: dict[str, tuple[int, ...]] = {}
        for step in steps:
            for index, name in enumerate(step.inputs):
                if name is None or name not in fixed:
                    continue
                value = self.value(name, values)
                if index in step.implementation.integer_inputs:
                    integers[name] = to_integers(value)
                else:
                    known[name] = to_device(value.detach(), device)
        for name in self.output_names:
            if name in fixed:
                known[name] = self.value(name, values).detach()
        return Program(tuple(steps), known, integers)


def load_graph_module(path: str | os.PathLike[str], *, watch: Sequence[str] = ()) -> GraphModule:
    """An ONNX file as a module with trainable weights. Raises UserError for an operator without a torch
    implementation."""
    return GraphModule(load(path), watch=watch)


class ParameterNamespace(torch.nn.Module):
    """Holds parameters whose names have a dot."""


def to_device(value: Any, device: torch.device | None) -> Any:
    return value.to(device) if device is not None and isinstance(value, torch.Tensor) else value


def to_integers(value: Tensor) -> tuple[int, ...]:
    return tuple(int(n) for n in value.reshape(-1).tolist())


def has_data_dependent_shape(step: Instruction, fixed: set[str], loose: set[str]) -> bool:
    """Can the shape of what a step makes differ between inputs of the same shapes?"""
    given = [name for name in step.inputs if name is not None]
    if loose.intersection(given):
        return True
    if step.implementation.data_dependent_shape:
        return not all(name in fixed for name in given)
    sized = [step.inputs[k] for k in step.implementation.integer_inputs if k < len(step.inputs)]
    return any(name is not None and name not in fixed for name in sized)


def run_instruction(
    step: Instruction,
    arguments: Sequence[Any],
    values: dict[str, Tensor],
    around: Callable[[Instruction, Sequence[Any]], Result] | None = None,
) -> None:
    try:
        found = around(step, arguments) if around else step.implementation.run(step.call, *arguments)
    except AssertionError as error:
        raise UserError(f"{step.name} ({step.call.op}): {error}: it cannot be trained through here") from None
    for name, value in zip(step.outputs, found if isinstance(found, tuple) else (found,), strict=False):
        if name:
            values[name] = value


def initializer_array(graph: ir.Graph, name: str) -> Any:
    value = graph.initializers.get(name) or next(v for v in graph.initializers.values() if original_name(v) == name)
    assert value.const_value is not None
    return value.const_value.numpy()


def required_nodes(graph: ir.Graph, results: Sequence[str]) -> list[ir.Node]:
    """The nodes that the results are computed with, in order."""
    wanted = set(results)
    found = []
    for node in reversed(list(graph)):
        if any(value.name in wanted for value in node.outputs):
            found.append(node)
            wanted |= {str(value.name) for value in node.inputs if value is not None}
    return found[::-1]


def weight_free_instructions(steps: Sequence[Instruction], weights: set[str]) -> frozenset[str]:
    """Names of the steps that nothing reaches that a weight has met."""
    met = set(weights)
    found = set()
    for step in steps:
        if met.isdisjoint(name for name in step.inputs if name is not None):
            found.add(step.name)
        else:
            met |= set(step.outputs)
    return frozenset(found)


def compile_instructions(model: ir.Model, nodes: Sequence[ir.Node]) -> Iterator[Instruction]:
    for node in nodes:
        found = find_implementation(node.domain, node.op_type)
        if found is None or any(
            a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in node.attributes.values()
        ):
            label = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
            raise UserError(
                f"{node.name}: there is no torch implementation of {label}, so this model cannot be trained here; "
                "export it without that operator, or train it where it came from"
            )
        inputs = tuple(None if v is None else str(v.name) for v in node.inputs)
        outputs = tuple(str(v.name) for v in node.outputs)
        call = OperatorCall(node.op_type, opset_version(model, node.domain), attribute_values(node), len(outputs))
        yield Instruction(str(node.name), call, found, inputs, outputs, node.domain)
