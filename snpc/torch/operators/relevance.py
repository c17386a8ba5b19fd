"""Layer-wise relevance propagation as gradient times input: each operator with the part held fixed that its rule says.

What comes out of an operator is unchanged; only its gradient is another one. Rules after Achtibat et al. 2024
(arXiv 2402.05602); operators without a rule here keep their own gradient. Attention as one node has the rules of its
parts, so that it does not matter whether an exporter has fused them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from snpc.ops import lookup
from snpc.torch.module import GraphModule, Instruction
from snpc.torch.operators.registry import OperatorCall, Result, Tensor

MIN_ACTIVATION = 1e-6  # an activation function's factor f(x) / x is not taken where |x| is less

MATMUL_FUNCTIONS = (torch.matmul, torch.Tensor.matmul, torch.Tensor.__matmul__)
HEADS_RANK = 4  # axes of queries, keys and values that are split into heads


@contextmanager
def relevance_rules(module: GraphModule) -> Iterator[None]:
    """The module with these rules, while the block runs."""
    constants = set(module.origins)
    for step in module.instructions:
        if all(name is None or name in constants for name in step.inputs):
            constants |= set(step.outputs)

    def run(step: Instruction, arguments: Sequence[Any]) -> Result:
        return run_with_relevance_rule(step, arguments, [name not in constants for name in step.inputs])

    module.interceptor = run
    try:
        yield
    finally:
        module.interceptor = None


def run_with_relevance_rule(step: Instruction, arguments: Sequence[Any], active: Sequence[bool]) -> Result:
    """``active``: which of the inputs are activations."""
    call, spec = step.call, lookup(step.domain, step.call.op)

    def plain(*given: Any) -> Result:
        return step.implementation.run(call, *given)

    flowing = [k for k, x in enumerate(arguments) if active[k] and isinstance(x, Tensor) and x.requires_grad]
    if call.op in ("LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization") and flowing == [0]:
        return hold_deviation_fixed(call, plain(*arguments), *arguments)
    if call.op in ("Div", "Pow") and 1 in flowing:
        return plain(arguments[0], arguments[1].detach(), *arguments[2:])
    if (spec.kind == "contraction" or (spec.kind == "pointwise" and spec.effect == "scale")) and sum(active[:2]) == 2:
        return halve_product_gradient(plain(*arguments), plain, arguments)
    if spec.kind == "attention":
        with HalvedProducts():
            return plain(*arguments)
    if spec.kind == "pointwise" and spec.effect == "nonlinear" and len(flowing) == 1:
        return hold_factor_fixed(plain(*arguments), arguments[flowing[0]])
    return plain(*arguments)


def halve_product_gradient(value: Result, plain: Any, arguments: Sequence[Any]) -> Result:
    """A product of two activations: half to each."""
    assert isinstance(value, Tensor)
    first, second, *rest = arguments
    paths = (plain(first, second.detach(), *rest) + plain(first.detach(), second, *rest)) / 2
    return with_gradient_of(value, paths)


class HalvedProducts(TorchFunctionMode):
    """The products inside an attention node, of queries with keys and of weights with values: half to each. Those with
    weights that the node holds are of fewer axes."""

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        value = func(*args, **(kwargs or {}))
        if func not in MATMUL_FUNCTIONS or not args[0].ndim == args[1].ndim == HEADS_RANK:
            return value
        return halve_product_gradient(value, func, args)


def hold_factor_fixed(value: Result, x: Tensor) -> Result:
    """f(x) as x times f(x) / x, the factor held fixed."""
    if not isinstance(value, Tensor) or value.shape != x.shape or not value.is_floating_point():
        return value
    safe = torch.where(x.abs() > MIN_ACTIVATION, x, torch.ones_like(x)).detach()
    factor = torch.where(x.abs() > MIN_ACTIVATION, value / safe, torch.zeros_like(x)).detach()
    return with_gradient_of(value, x * factor)


def hold_deviation_fixed(
    call: OperatorCall, value: Result, x: Tensor, scale: Tensor, bias: Tensor | None = None
) -> Result:
    """With the deviation held fixed."""
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    gap = x - x.mean(axes, keepdim=True) if call.op.startswith("Layer") else x
    spread = (gap.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5)).sqrt().detach()
    return with_gradient_of(value if isinstance(value, Tensor) else value[0], gap / spread * scale.detach())


def with_gradient_of(value: Tensor, path: Tensor) -> Tensor:
    """``value``, with the gradient of ``path``."""
    return value.detach() + path - path.detach()
