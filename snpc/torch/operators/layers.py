"""Products with weights, convolutions, pooling, reductions and normalizations."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from snpc.ops import MICROSOFT
from snpc.torch.operators.registry import Integers, OperatorCall, Tensor, axis_list, implements


@implements("MatMul")
def run_matmul(call: OperatorCall, a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@implements("FusedMatMul", domain=MICROSOFT)
def run_fused_matmul(call: OperatorCall, a: Tensor, b: Tensor) -> Tensor:
    left = a.mT if call.get("transA", 0) else a
    product = torch.matmul(left, b.mT if call.get("transB", 0) else b)
    return torch.mul(product, call.get("alpha", 1.0))


FUSED_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Relu": F.relu, "Tanh": torch.tanh, "Sigmoid": torch.sigmoid, "": lambda x: x,
}  # fmt: skip


@implements("Gemm")
def run_gemm(call: OperatorCall, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    product = torch.matmul(a.mT if call.get("transA", 0) else a, b.mT if call.get("transB", 0) else b)
    scaled = product * call.get("alpha", 1.0) if call.get("alpha", 1.0) != 1 else product
    return scaled if c is None else scaled + (c * call.get("beta", 1.0) if call.get("beta", 1.0) != 1 else c)


@implements("FusedGemm", domain=MICROSOFT)
def run_fused_gemm(call: OperatorCall, a: Tensor, b: Tensor, c: Tensor | None = None) -> Tensor:
    return FUSED_ACTIVATIONS[call.get("activation", "")](run_gemm(call, a, b, c))


@implements("Einsum")
def run_einsum(call: OperatorCall, *values: Tensor) -> Tensor:
    return torch.einsum(call.attrs["equation"], *values)


# -- windows ---------------------------------------------------------------------------------------------------------


def window_padding(
    call: OperatorCall, x: Tensor, kernel: list[int], stride: list[int], dilation: list[int]
) -> list[int]:
    """[before..., after...] per spatial axis."""
    spatial = len(kernel)
    mode = call.get("auto_pad", "NOTSET")
    if mode in ("NOTSET", ""):
        return list(call.get("pads", [0] * 2 * spatial))
    if mode == "VALID":
        return [0] * 2 * spatial
    before, after = [], []
    for k in range(spatial):
        size = x.shape[2 + k]
        need = max((-(-size // stride[k]) - 1) * stride[k] + dilation[k] * (kernel[k] - 1) + 1 - size, 0)
        small = need // 2
        before.append(small if mode == "SAME_UPPER" else need - small)
        after.append(need - before[-1])
    return before + after


def pad_spatial(x: Tensor, pads: list[int], value: float = 0.0) -> Tensor:
    spatial = len(pads) // 2
    if not any(pads):
        return x
    return F.pad(x, [n for k in reversed(range(spatial)) for n in (pads[k], pads[spatial + k])], value=value)


@implements("Conv")
def run_conv(call: OperatorCall, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    spatial = w.ndim - 2
    stride, dilation = (list(call.get(name, [1] * spatial)) for name in ("strides", "dilations"))
    pads = window_padding(call, x, list(w.shape[2:]), stride, dilation)
    run = (F.conv1d, F.conv2d, F.conv3d)[spatial - 1]
    return run(pad_spatial(x, pads), w, b, stride=stride, dilation=dilation, groups=call.get("group", 1))


@implements("FusedConv", domain=MICROSOFT)
def run_fused_conv(
    call: OperatorCall, x: Tensor, w: Tensor, b: Tensor | None = None, added: Tensor | None = None
) -> Tensor:
    assert call.get("activation", "") in FUSED_ACTIVATIONS, "this activation of a FusedConv is not implemented"
    output = run_conv(call, x, w, b)
    return FUSED_ACTIVATIONS[call.get("activation", "")](output if added is None else output + added)


@implements("ConvTranspose")
def run_conv_transpose(call: OperatorCall, x: Tensor, w: Tensor, b: Tensor | None = None) -> Tensor:
    spatial = w.ndim - 2
    assert call.get("auto_pad", "NOTSET") in ("NOTSET", "VALID") and "output_shape" not in call.attrs
    stride, dilation = (list(call.get(name, [1] * spatial)) for name in ("strides", "dilations"))
    pads = list(call.get("pads", [0] * 2 * spatial))
    extra = list(call.get("output_padding", [0] * spatial))
    run = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[spatial - 1]
    whole = run(x, w, None, stride=stride, dilation=dilation, groups=call.get("group", 1))
    whole = pad_spatial(whole, [0] * spatial + extra)
    for k in range(spatial):
        whole = whole.narrow(2 + k, pads[k], whole.shape[2 + k] - pads[k] - pads[spatial + k])
    return whole if b is None else whole + b.reshape(-1, *[1] * spatial)


@implements("MaxPool", "AveragePool")
def run_pool(call: OperatorCall, x: Tensor) -> Tensor:
    kernel = list(call.attrs["kernel_shape"])
    spatial = len(kernel)
    stride, dilation = (list(call.get(name, [1] * spatial)) for name in ("strides", "dilations"))
    pads = window_padding(call, x, kernel, stride, dilation)
    if call.get("ceil_mode", 0):
        for k in range(spatial):
            size = x.shape[2 + k] + pads[k] + pads[spatial + k] - dilation[k] * (kernel[k] - 1) - 1
            short = -size % stride[k]
            pads[spatial + k] += short
    if call.op == "MaxPool":
        run = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[spatial - 1]
        return run(pad_spatial(x, pads, -math.inf), kernel, stride, 0, dilation)
    mean = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1]
    summed = mean(pad_spatial(x, pads), kernel, stride)
    if call.get("count_include_pad", 0) or not any(pads):
        return summed
    return summed / mean(pad_spatial(torch.ones_like(x), pads), kernel, stride)


@implements("LpPool")
def run_lp_pool(call: OperatorCall, x: Tensor) -> Tensor:
    p = call.get("p", 2)
    kernel = list(call.attrs["kernel_shape"])
    spatial = len(kernel)
    stride, dilation = (list(call.get(name, [1] * spatial)) for name in ("strides", "dilations"))
    assert not call.get("ceil_mode", 0) and set(dilation) == {1}, "this LpPool is not implemented"
    powers = pad_spatial(x.abs().pow(p), window_padding(call, x, kernel, stride, dilation))
    mean: Tensor = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[spatial - 1](powers, kernel, stride)
    norm: Tensor = (mean * math.prod(kernel)).pow(1 / p)
    return norm


@implements("GlobalLpPool")
def run_global_lp_pool(call: OperatorCall, x: Tensor) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, call.get("p", 2), dim=list(range(2, x.ndim)), keepdim=True)
    return norm


@implements("GlobalAveragePool", "GlobalMaxPool")
def run_global_pool(call: OperatorCall, x: Tensor) -> Tensor:
    axes = list(range(2, x.ndim))
    return x.mean(axes, keepdim=True) if call.op == "GlobalAveragePool" else x.amax(axes, keepdim=True)


@implements("Resize", "Upsample")
def run_resize(
    call: OperatorCall, x: Tensor, roi: Tensor | None = None, scales: Tensor | None = None, sizes: Tensor | None = None
) -> Tensor:
    if call.op == "Upsample":
        scales = roi
    mode = call.get("mode", "nearest")
    coordinates = call.get("coordinate_transformation_mode", "half_pixel" if call.op == "Resize" else "asymmetric")
    assert "axes" not in call.attrs and x.ndim in (3, 4, 5), "this Resize is not implemented"
    factors = scales.tolist() if scales is not None else []
    output_sizes = sizes.tolist() if sizes is not None else [int(n * s) for n, s in zip(x.shape, factors, strict=True)]
    assert output_sizes[:2] == list(x.shape[:2]), "a Resize of batch or channels is not implemented"
    if mode == "nearest":
        rounding = (coordinates, call.get("nearest_mode", "round_prefer_floor"))
        torch_modes = {("asymmetric", "floor"): "nearest", ("half_pixel", "round_prefer_floor"): "nearest-exact"}
        assert rounding in torch_modes, "this rounding of a nearest Resize is not implemented"
        return F.interpolate(x, output_sizes[2:], mode=torch_modes[rounding])
    name = "bicubic" if mode == "cubic" else {3: "linear", 4: "bilinear", 5: "trilinear"}[x.ndim]
    assert coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners"), "this Resize is not implemented"
    assert mode != "cubic" or call.get("cubic_coeff_a", -0.75) == -0.75, "this Resize is not implemented"
    return F.interpolate(x, output_sizes[2:], mode=name, align_corners=coordinates == "align_corners")


# -- statistics ------------------------------------------------------------------------------------------------------

REDUCTIONS: dict[str, Callable[[Tensor, list[int], bool], Tensor]] = {
    "ReduceMean": lambda x, axes, keep: x.mean(axes, keepdim=keep),
    "ReduceSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).to(x.dtype),
    "ReduceMax": lambda x, axes, keep: x.amax(axes, keepdim=keep),
    "ReduceMin": lambda x, axes, keep: x.amin(axes, keepdim=keep),
    "ReduceL1": lambda x, axes, keep: x.abs().sum(axes, keepdim=keep),
    "ReduceL2": lambda x, axes, keep: torch.linalg.vector_norm(x, dim=axes, keepdim=keep),
    "ReduceSumSquare": lambda x, axes, keep: x.square().sum(axes, keepdim=keep),
    "ReduceLogSumExp": lambda x, axes, keep: torch.logsumexp(x, axes, keepdim=keep),
    "ReduceLogSum": lambda x, axes, keep: x.sum(axes, keepdim=keep).log(),
}


@implements("ReduceProd", integer_inputs=(1,))
def run_reduce_product(call: OperatorCall, x: Tensor, axes: Integers | None = None) -> Tensor:
    for axis in sorted(axis_list(call, axes, x.ndim) or range(x.ndim), reverse=True):
        x = x.prod(axis, keepdim=bool(call.get("keepdims", 1)))
    return x


@implements(*REDUCTIONS, integer_inputs=(1,))
def run_reduction(call: OperatorCall, x: Tensor, axes: Integers | None = None) -> Tensor:
    over = axis_list(call, axes, x.ndim)
    if not over:
        if call.get("noop_with_empty_axes", 0):
            return x
        over = list(range(x.ndim))
    return REDUCTIONS[call.op](x, over, bool(call.get("keepdims", 1)))


@implements("ArgMax", "ArgMin")
def run_arg_extreme(call: OperatorCall, x: Tensor) -> Tensor:
    assert not call.get("select_last_index", 0), "select_last_index is not implemented"
    run = torch.argmax if call.op == "ArgMax" else torch.argmin
    return run(x, call.get("axis", 0), bool(call.get("keepdims", 1)))


@implements("LayerNormalization")
def run_layer_normalization(call: OperatorCall, x: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    axis = call.get("axis", -1) % x.ndim
    axes = list(range(axis, x.ndim))
    if list(scale.shape) == list(x.shape[axis:]):
        return F.layer_norm(x, x.shape[axis:], scale, bias, call.get("epsilon", 1e-5))
    centered = x - x.mean(axes, keepdim=True)
    normalized = centered * torch.rsqrt(centered.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5)) * scale
    return normalized if bias is None else normalized + bias


@implements("RMSNormalization", "SimplifiedLayerNormalization")
def run_rms_normalization(call: OperatorCall, x: Tensor, scale: Tensor) -> Tensor:
    axes = list(range(call.get("axis", -1) % x.ndim, x.ndim))
    wide = x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
    normalized = wide * torch.rsqrt(wide.square().mean(axes, keepdim=True) + call.get("epsilon", 1e-5))
    return normalized.to(x.dtype) * scale


implements("SimplifiedLayerNormalization", domain=MICROSOFT)(run_rms_normalization)


@implements("SkipLayerNormalization", domain=MICROSOFT)
def run_skip_normalization(
    call: OperatorCall, x: Tensor, skip: Tensor, gamma: Tensor, beta: Tensor | None = None, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    total = x + skip if bias is None else x + skip + bias
    normalized = F.layer_norm(total, gamma.shape, gamma, beta, call.get("epsilon", 1e-12))
    return normalized, total, total, total


@implements("SkipSimplifiedLayerNormalization", domain=MICROSOFT)
def run_skip_rms_normalization(
    call: OperatorCall, x: Tensor, skip: Tensor, gamma: Tensor, bias: Tensor | None = None
) -> tuple[Tensor, ...]:
    total = x + skip if bias is None else x + skip + bias
    return run_rms_normalization(call, total, gamma), total, total, total


@implements("EmbedLayerNormalization", domain=MICROSOFT)
def run_embed_normalization(
    call: OperatorCall, ids: Tensor, segments: Tensor | None, words: Tensor, positions: Tensor,
    segment_table: Tensor | None, gamma: Tensor, beta: Tensor, mask: Tensor | None = None, places: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    position_ids = torch.arange(ids.shape[1], device=ids.device) if places is None else places
    total = F.embedding(ids, words) + F.embedding(position_ids, positions)
    if segments is not None and segment_table is not None:
        total = total + F.embedding(segments, segment_table)
    counts = ids.new_full((len(ids),), ids.shape[1]) if mask is None else mask.sum(1)
    return F.layer_norm(total, gamma.shape, gamma, beta, call.get("epsilon", 1e-12)), counts.to(torch.int32), total


@implements("BatchNormalization")
def run_batch_normalization(
    call: OperatorCall, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor
) -> Tensor:
    return F.batch_norm(x, mean, variance, scale, bias, training=False, eps=call.get("epsilon", 1e-5))


@implements("InstanceNormalization")
def run_instance_normalization(call: OperatorCall, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=call.get("epsilon", 1e-5))


@implements("GroupNormalization")
def run_group_normalization(call: OperatorCall, x: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    groups = call.attrs["num_groups"]
    if len(scale) == groups != x.shape[1]:
        scale, bias = (v.repeat_interleave(x.shape[1] // groups) for v in (scale, bias))
    return F.group_norm(x, groups, scale, bias, call.get("epsilon", 1e-5))


@implements("LpNormalization")
def run_lp_normalization(call: OperatorCall, x: Tensor) -> Tensor:
    return torch.div(x, torch.linalg.vector_norm(x, call.get("p", 2), dim=call.get("axis", -1), keepdim=True))


@implements("MeanVarianceNormalization")
def run_mean_variance_normalization(call: OperatorCall, x: Tensor) -> Tensor:
    axes = list(call.get("axes", [0, 2, 3]))
    centered = x - x.mean(axes, keepdim=True)
    return centered / (centered.square().mean(axes, keepdim=True) + 1e-9).sqrt()
