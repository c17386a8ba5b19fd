"""Operators that move entries, read shapes, or make constants."""

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


@implements("ConstantOfShape", integer_inputs=(0,))
def run_constant_of_shape(call: OperatorCall, sizes: Integers) -> Tensor:
    value = call.get("value")
    fill = torch.zeros(1) if value is None else to_tensor(value.numpy())
    return fill.reshape(()).expand(sizes).clone() if sizes else fill.reshape(())


@implements("Range", data_dependent_shape=True)
def run_range(call: OperatorCall, start: Tensor, limit: Tensor, delta: Tensor) -> Tensor:
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype, device=start.device)


@implements("EyeLike")
def run_eye_like(call: OperatorCall, x: Tensor) -> Tensor:
    kind = call.get("dtype")
    eye = torch.zeros_like(x, dtype=TORCH_DTYPES[kind] if kind else x.dtype)
    eye.diagonal(call.get("k", 0)).fill_(1)
    return eye


@implements("Reshape", integer_inputs=(1,))
def run_reshape(call: OperatorCall, x: Tensor, sizes: Integers | None = None) -> Tensor:
    shape = call.attrs["shape"] if sizes is None else sizes
    if not call.get("allowzero", 0):
        shape = [x.shape[k] if n == 0 else n for k, n in enumerate(shape)]
    return x.reshape(list(shape))


@implements("Flatten")
def run_flatten(call: OperatorCall, x: Tensor) -> Tensor:
    axis = call.get("axis", 1)
    axis = axis + x.ndim if axis < 0 else axis
    return x.reshape(math.prod(x.shape[:axis]), math.prod(x.shape[axis:]))


@implements("Transpose")
def run_transpose(call: OperatorCall, x: Tensor) -> Tensor:
    return x.permute(list(call.get("perm", range(x.ndim)[::-1])))


@implements("Squeeze", integer_inputs=(1,))
def run_squeeze(call: OperatorCall, x: Tensor, axes: Integers | None = None) -> Tensor:
    squeezed = axis_list(call, axes, x.ndim) or [k for k, n in enumerate(x.shape) if n == 1]
    return x.reshape([n for k, n in enumerate(x.shape) if k not in squeezed])


@implements("Unsqueeze", integer_inputs=(1,))
def run_unsqueeze(call: OperatorCall, x: Tensor, axes: Integers | None = None) -> Tensor:
    count = len(axes if axes is not None else call.attrs["axes"])
    for k in sorted(axis_list(call, axes, x.ndim + count)):
        x = x.unsqueeze(k)
    return x


@implements("Concat")
def run_concat(call: OperatorCall, *values: Tensor) -> Tensor:
    return torch.cat(values, dim=call.attrs["axis"])


@implements("Expand", integer_inputs=(1,))
def run_expand(call: OperatorCall, x: Tensor, sizes: Integers) -> Tensor:
    return x.expand(torch.broadcast_shapes(x.shape, sizes))  # type: ignore[no-untyped-call]


@implements("Tile", integer_inputs=(1,))
def run_tile(call: OperatorCall, x: Tensor, repeats: Integers) -> Tensor:
    return x.repeat(repeats)


@implements("Slice", integer_inputs=(1, 2, 3, 4))
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
    sliced_axes = axes if axes is not None else call.get("axes", range(len(starts)))
    for axis, start, end, step in zip(sliced_axes, starts, ends, steps or [1] * len(starts), strict=True):
        axis = axis % x.ndim
        if step > 0:
            begin, stop, _ = slice(start, end, step).indices(x.shape[axis])
            x = x[(slice(None),) * axis + (slice(begin, max(stop, begin), step),)]
        else:
            picked = torch.tensor(list(range(*slice(start, end, step).indices(x.shape[axis]))), device=x.device)
            x = x.index_select(axis, picked.to(torch.int64))
    return x


@implements("Split", integer_inputs=(1,))
def run_split(call: OperatorCall, x: Tensor, sizes: Integers | None = None) -> tuple[Tensor, ...]:
    axis = call.get("axis", 0)
    parts = sizes if sizes is not None else call.get("split")
    if parts is None:
        parts = [-(-x.shape[axis] // call.outputs)] * call.outputs
        parts[-1] = x.shape[axis] - sum(parts[:-1])
    return tuple(torch.split(x, list(parts), dim=axis))


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
    positions = tuple(index[..., k] for k in range(index.shape[-1]))
    if call.get("reduction", "none") == "add":
        return x.index_put(positions, updates, accumulate=True)
    assert call.get("reduction", "none") == "none", "this reduction is not implemented"
    return x.index_put(positions, updates)


@implements("Scatter", "ScatterElements")
def run_scatter_elements(call: OperatorCall, x: Tensor, index: Tensor, updates: Tensor) -> Tensor:
    axis = call.get("axis", 0) % x.ndim
    index = torch.where(index < 0, index + x.shape[axis], index)
    kind = call.get("reduction", "none")
    if kind == "none":
        return x.scatter(axis, index, updates)
    return x.scatter_reduce(axis, index, updates, {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}[kind])


@implements("Pad", integer_inputs=(1, 3))
def run_pad(
    call: OperatorCall,
    x: Tensor,
    pads: Integers | None = None,
    value: Tensor | None = None,
    axes: Integers | None = None,
) -> Tensor:
    amounts = pads if pads is not None else call.attrs["pads"]
    padded_axes = [k % x.ndim for k in axes] if axes is not None else list(range(x.ndim))
    before, after = [0] * x.ndim, [0] * x.ndim
    for k, axis in enumerate(padded_axes):
        before[axis], after[axis] = amounts[k], amounts[len(padded_axes) + k]
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
    product = values.cumprod(k).to(x.dtype)
    return product.flip(k) if call.get("reverse", 0) else product


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
    angle = 2 * math.pi * n / (count if call.get("periodic", 1) else count - 1)
    first, second, third = WINDOW_COEFFICIENTS[call.op]
    values = first - second * angle.cos() + third * (2 * angle).cos()
    return values.to(TORCH_DTYPES[call.get("output_datatype", 1)])


@implements("TopK", integer_inputs=(1,))
def run_top_k(call: OperatorCall, x: Tensor, count: Integers | None = None) -> tuple[Tensor, ...]:
    k = count[0] if count is not None else call.attrs["k"]
    top = torch.topk(x, k, call.get("axis", -1), bool(call.get("largest", 1)), bool(call.get("sorted", 1)))
    return top.values, top.indices


GRID_MODES = {"linear": "bilinear", "cubic": "bicubic"}  # names of opset 20 -> those of torch and older opsets


@implements("GridSample")
def run_grid_sample(call: OperatorCall, x: Tensor, grid: Tensor) -> Tensor:
    mode = call.get("mode", "bilinear")
    padding, corners = call.get("padding_mode", "zeros"), bool(call.get("align_corners", 0))
    return F.grid_sample(x, grid, GRID_MODES.get(mode, mode), padding, corners)


@implements("OneHot", data_dependent_shape=True)
def run_one_hot(call: OperatorCall, index: Tensor, depth: Tensor, values: Tensor) -> Tensor:
    count = int(depth.item())
    index = torch.where(index < 0, index + count, index).to(torch.int64)
    hot = (index.unsqueeze(-1) == torch.arange(count, device=index.device)).to(values.dtype)
    return (hot * (values[1] - values[0]) + values[0]).movedim(-1, call.get("axis", -1))


@implements("NonZero", data_dependent_shape=True)
def run_nonzero(call: OperatorCall, x: Tensor) -> Tensor:
    return torch.nonzero(x).T
