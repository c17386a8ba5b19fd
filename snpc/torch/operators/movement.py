"""Operators that move positions, read shapes, or make constants of them."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F

from snpc.torch.operators.registry import TORCH_DTYPES, Integers, OperatorCall, Tensor, axis_list, implements, to_tensor


@implements("Shape", reads="shape")
def run_shape(call: OperatorCall, x: Tensor) -> Tensor:
    sizes = list(x.shape)[call.get("start", 0) : call.get("end", None)]
    return torch.tensor(sizes, dtype=torch.int64)


@implements("Size", reads="shape")
def run_size(call: OperatorCall, x: Tensor) -> Tensor:
    return torch.tensor(x.numel(), dtype=torch.int64)


@implements("Constant")
def run_constant(call: OperatorCall) -> Tensor:
    for name, value in call.attrs.items():
        if name == "value":
            return to_tensor(value.numpy())
        kind = torch.float32 if "float" in name else torch.int64
        return torch.tensor(value, dtype=kind)
    raise AssertionError("a Constant without a value")


@implements("ConstantOfShape", integers=(0,))
def run_constant_of_shape(call: OperatorCall, sizes: Integers) -> Tensor:
    value = call.get("value")
    fill = torch.zeros(1) if value is None else to_tensor(value.numpy())
    return fill.reshape(()).expand(sizes).clone() if sizes else fill.reshape(())


@implements("Range", loose=True)
def run_range(call: OperatorCall, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


@implements("EyeLike")
def run_eye_like(call: OperatorCall, x: Tensor) -> Tensor:
    kind = call.get("dtype")
    made = torch.zeros_like(x, dtype=TORCH_DTYPES[kind] if kind else x.dtype)
    made.diagonal(call.get("k", 0)).fill_(1)
    return made


@implements("Reshape", integers=(1,))
def run_reshape(call: OperatorCall, x: Tensor, sizes: Integers | None = None) -> Tensor:
    wanted = call.attrs["shape"] if sizes is None else sizes
    if not call.get("allowzero", 0):
        wanted = [x.shape[k] if n == 0 else n for k, n in enumerate(wanted)]
    return x.reshape(list(wanted))


@implements("Flatten")
def run_flatten(call: OperatorCall, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@implements("Transpose")
def run_transpose(call: OperatorCall, x: Tensor) -> Tensor:
    return x.permute(list(call.get("perm", range(x.ndim)[::-1])))


@implements("Squeeze", integers=(1,))
def run_squeeze(call: OperatorCall, x: Tensor, axes: Integers | None = None) -> Tensor:
    given = axis_list(call, axes, x.ndim) or [k for k, n in enumerate(x.shape) if n == 1]
    return x.reshape([n for k, n in enumerate(x.shape) if k not in given])


@implements("Unsqueeze", integers=(1,))
def run_unsqueeze(call: OperatorCall, x: Tensor, axes: Integers | None = None) -> Tensor:
    count = len(axes if axes is not None else call.attrs["axes"])
    for k in sorted(axis_list(call, axes, x.ndim + count)):
        x = x.unsqueeze(k)
    return x


@implements("Concat")
def run_concat(call: OperatorCall, *values: Tensor) -> Tensor:
    return torch.cat(values, dim=call.attrs["axis"])


@implements("Expand", integers=(1,))
def run_expand(call: OperatorCall, x: Tensor, sizes: Integers) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, sizes))  # type: ignore[no-untyped-call]


@implements("Tile", integers=(1,))
def run_tile(call: OperatorCall, x: Tensor, repeats: Integers) -> Tensor:
    return x.repeat(repeats)


@implements("Slice", integers=(1, 2, 3, 4))
def run_slice(
    call: OperatorCall,
    x: Tensor,
    starts: Integers | None = None,
    ends: Integers | None = None,
    axes: Integers | None = None,
    steps: Integers | None = None,
) -> Tensor:
    starts = starts if starts is not None else tuple(call.attrs["starts"])
    ends = ends if ends is not None else tuple(call.attrs["ends"])
    where = axes if axes is not None else call.get("axes", range(len(starts)))
    for axis, start, end, step in zip(where, starts, ends, steps or [1] * len(starts), strict=True):
        axis = axis % x.ndim
        if step > 0:
            begin, stop, _ = slice(start, end, step).indices(x.shape[axis])
            x = x[(slice(None),) * axis + (slice(begin, max(stop, begin), step),)]
        else:
            picked = torch.tensor(list(range(*slice(start, end, step).indices(x.shape[axis]))), device=x.device)
            x = x.index_select(axis, picked.to(torch.int64))
    return x


@implements("Split", integers=(1,))
def run_split(call: OperatorCall, x: Tensor, sizes: Integers | None = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    given = sizes if sizes is not None else call.get("split")
    if given is None:
        given = [-(-x.shape[axis] // call.outputs)] * call.outputs
        given[-1] = x.shape[axis] - sum(given[:-1])
    return tuple(torch.split(x, list(given), dim=axis))


@implements("Gather")
def run_gather(call: OperatorCall, x: Tensor, index: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index).to(torch.int64)
    picked = x.index_select(axis, index.reshape(-1))
    return picked.reshape(x.shape[:axis] + index.shape + x.shape[axis + 1 :])


@implements("GatherElements")
def run_gather_elements(call: OperatorCall, x: Tensor, index: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    return torch.gather(x, axis, torch.where(index < 0, index + x.shape[axis], index))


@implements("GatherND")
def run_gather_nd(call: OperatorCall, x: Tensor, index: Tensor) -> Tensor:
    lead, depth = call.get("batch_dims", 0), index.shape[-1]
    batch = [
        torch.arange(n, device=x.device).reshape([-1 if j == k else 1 for j in range(index.ndim - 1)])
        for k, n in enumerate(x.shape[:lead])
    ]
    return x[(*batch, *(index[..., k] for k in range(depth)))]


@implements("ScatterND")
def run_scatter_nd(call: OperatorCall, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    where = tuple(index[..., k] for k in range(index.shape[-1]))
    if call.get("reduction", "none") == "add":
        return x.index_put(where, updates, accumulate=True)
    assert call.get("reduction", "none") == "none", "this reduction is not implemented"
    return x.index_put(where, updates)


@implements("Scatter", "ScatterElements")
def run_scatter_elements(call: OperatorCall, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    kind = call.get("reduction", "none")
    if kind == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[kind])


@implements("Pad", integers=(1, 3))
def run_pad(
    call: OperatorCall,
    x: Tensor,
    pads: Integers | None = None,
    value: Tensor | None = None,
    axes: Integers | None = None,
) -> Tensor:
    given = pads if pads is not None else call.attrs["pads"]
    where = [k % x.ndim for k in axes] if axes is not None else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for k, axis in enumerate(where):
        before[axis], after[axis] = given[k], given[len(where) + k]
    mode = call.get("mode", "constant")
    mode = {"edge": "replicate", "wrap": "circular"}.get(mode, mode)
    used = [k for k in range(x.ndim) if before[k] or after[k]]
    if mode == "constant":
        fill: Any = call.get("value", 0.0) if value is None else value.item()
        return F.pad(x, [n for k in reversed(range(x.ndim)) for n in (before[k], after[k])], value=fill)
    for axis in used:  # torch pads other ways along the last axis only
        moved = x.movedim(axis, -1)
        flat = F.pad(moved.reshape(1, -1, moved.shape[-1]), [before[axis], after[axis]], mode=mode)
        x = flat.reshape(*moved.shape[:-1], -1).movedim(-1, axis)
    return x


@implements("DepthToSpace")
def run_depth_to_space(call: OperatorCall, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = call.attrs["blocksize"]
    if call.get("mode", "DCR") == "DCR":
        return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)


@implements("SpaceToDepth")
def run_space_to_depth(call: OperatorCall, x: Tensor) -> Tensor:
    n, c, h, w = x.shape
    b = call.attrs["blocksize"]
    return x.reshape(n, c, h // b, b, w // b, b).permute(0, 3, 5, 1, 2, 4).reshape(n, c * b**2, h // b, w // b)


@implements("Trilu")
def run_trilu(call: OperatorCall, x: Tensor, diagonal: Tensor | None = None) -> Tensor:
    k = 0 if diagonal is None else int(diagonal.item())
    return torch.triu(x, k) if call.get("upper", 1) else torch.tril(x, k)


@implements("CumSum")
def run_cumsum(call: OperatorCall, x: Tensor, axis: Tensor) -> Tensor:
    k = int(axis.item())
    values = x.flip(k) if call.get("reverse", 0) else x
    summed = values.cumsum(k).to(x.dtype)
    if call.get("exclusive", 0):
        summed = summed - values
    return summed.flip(k) if call.get("reverse", 0) else summed


@implements("CumProd")
def run_cumprod(call: OperatorCall, x: Tensor, axis: Tensor) -> Tensor:
    k = int(axis.item()) % x.ndim
    values = x.flip(k) if call.get("reverse", 0) else x
    if call.get("exclusive", 0):
        values = torch.cat([torch.ones_like(values.narrow(k, 0, 1)), values.narrow(k, 0, values.shape[k] - 1)], k)
    made = values.cumprod(k).to(x.dtype)
    return made.flip(k) if call.get("reverse", 0) else made


WINDOW_COEFFICIENTS = {
    "HannWindow": (0.5, 0.5, 0.0),
    "HammingWindow": (25 / 46, 21 / 46, 0.0),
    "BlackmanWindow": (0.42, 0.5, 0.08),
}


@implements(*WINDOW_COEFFICIENTS)
def run_window(call: OperatorCall, size: Tensor) -> Tensor:
    """a0 - a1 cos(2 pi n / N) + a2 cos(4 pi n / N)."""
    count = int(size.item())
    n = torch.arange(count, dtype=torch.float64, device=size.device)
    turn = 2 * math.pi * n / (count if call.get("periodic", 1) else count - 1)
    first, second, third = WINDOW_COEFFICIENTS[call.op]
    made = first - second * turn.cos() + third * (2 * turn).cos()
    return made.to(TORCH_DTYPES[call.get("output_datatype", 1)])


@implements("TopK", integers=(1,))
def run_top_k(call: OperatorCall, x: Tensor, count: Integers | None = None) -> tuple[Tensor, ...]:
    k = count[0] if count is not None else call.attrs["k"]
    found = torch.topk(x, k, call.get("axis", -1), bool(call.get("largest", 1)), bool(call.get("sorted", 1)))
    return found.values, found.indices


@implements("OneHot", loose=True)
def run_one_hot(call: OperatorCall, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count = int(depth.item())
    index = torch.where(index < 0, index + count, index).to(torch.int64)
    hot = (index.unsqueeze(-1) == torch.arange(count, device=index.device)).to(values.dtype)
    return (hot * (values[1] - values[0]) + values[0]).movedim(-1, call.get("axis", -1))


@implements("NonZero", loose=True)
def run_nonzero(call: OperatorCall, x: Tensor) -> Tensor:
    return torch.nonzero(x).T
