"""Layer-wise relevance propagation as gradient times input: gradients of units and gates.

Every operator computes the same output, and its gradient is replaced: the part that its rule names is held fixed. Rules
after Achtibat et al. 2024 (arXiv 2402.05602); operators without a rule here keep their own gradient. Attention as one
node has the rules of its parts, so an exporter's fusion changes nothing. ``snpc.runtime.statistics.token_relevance`` is
another implementation, by the z+ rule and without torch; tests compare the two where their rules are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from snpc.ops import lookup
from snpc.torch.operators.registry import OperatorCall, Result, Tensor

if TYPE_CHECKING:  # the module imports the operators
    from snpc.torch.module import GraphModule, Instruction

MIN_ACTIVATION = 1e-6  # where |x| is less, the factor f(x) / x of an activation function is 0

MATMUL_FUNCTIONS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
HEADS_RANK = 4  # axes of queries, keys and values that are split into heads
NORMALIZATIONS = ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization")


@contextmanager
def relevance_rules(module: GraphModule) -> Iterator[None]:
    """The module with these rules, while the block runs."""
    constants = set(module.origins)
    for instruction in module.instructions:
        if all(name is None or name in constants for name in instruction.inputs):
            constants |= set(instruction.outputs)

    def run(instruction: Instruction, arguments: Sequence[Any]) -> Result:
        active = [name not in constants for name in instruction.inputs]
        return run_with_relevance_rule(instruction, arguments, active)

    module.interceptor = run
    try:
        yield
    finally:
        module.interceptor = None


def run_with_relevance_rule(instruction: Instruction, arguments: Sequence[Any], active: Sequence[bool]) -> Result:
    """``active``: which of the inputs are activations."""
    call, spec = instruction.call, lookup(instruction.domain, instruction.call.op)

    def run(*inputs: Any) -> Result:
        return instruction.implementation.run(call, *inputs)

    differentiated = [k for k, x in enumerate(arguments) if active[k] and isinstance(x, Tensor) and x.requires_grad]
    if call.op in NORMALIZATIONS and differentiated == [0]:
        return hold_deviation_fixed(call, run(*arguments), *arguments)
    if call.op in ("Div", "Pow") and 1 in differentiated:
        return run(arguments[0], arguments[1].detach(), *arguments[2:])
    is_product = spec.kind == "contraction" or (spec.kind == "pointwise" and spec.effect == "scale")
    if is_product and sum(active[:2]) == 2:
        return halve_product_gradient(run(*arguments), run, arguments)
    if spec.kind == "attention":
        with HalvedProducts():
            return run(*arguments)
    if spec.kind == "pointwise" and spec.effect == "nonlinear" and len(differentiated) == 1:
        return hold_factor_fixed(run(*arguments), arguments[differentiated[0]])
    return run(*arguments)


def halve_product_gradient(value: Result, product: Callable[..., Any], arguments: Sequence[Any]) -> Result:
    """A product of two activations: half of the relevance to each."""
    assert isinstance(value, Tensor)
    first, second, *rest = arguments
    path = (product(first, second.detach(), *rest) + product(first.detach(), second, *rest)) / 2
    return with_gradient_of(value, path)


class HalvedProducts(TorchFunctionMode):
    """Inside an attention node, products of queries with keys and of attention weights with values: half to each
    factor. Projections that the node holds have fewer axes, so they are left alone."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if func not in MATMUL_FUNCTIONS or not args[0].ndim == args[1].ndim == HEADS_RANK:
            return value
        return halve_product_gradient(value, func, args)


def hold_factor_fixed(value: Result, x: Tensor) -> Result:
    """f(x) as x times f(x) / x, the factor held fixed."""
    if not isinstance(value, Tensor) or value.shape != x.shape or not value.is_floating_point():
        return value
    large = x.abs() > MIN_ACTIVATION
    safe = torch.where(large, x, torch.ones_like(x)).detach()
    factor = torch.where(large, value / safe, torch.zeros_like(x)).detach()
    return with_gradient_of(value, x * factor)


def hold_deviation_fixed(
    call: OperatorCall, value: Result, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Result:
    """Normalization with the standard deviation held fixed."""
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    centered = x - x.mean(axes, keepdim=True) if call.op.startswith("Layer") else x
    deviation = (centered.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5)).sqrt().detach()
    output = value if isinstance(value, Tensor) else value[0]
    return with_gradient_of(output, centered / deviation * scale.detach())


def with_gradient_of(value: Tensor, path: Tensor) -> Tensor:
    """``value``, with the gradient of ``path``."""
    return value.detach() + path - path.detach()
