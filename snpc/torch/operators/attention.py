"""Attention and rotary embedding as single nodes."""

from __future__ import annotations

import math

import torch

from snpc.ops import MICROSOFT
from snpc.torch.operators.registry import OperatorCall, Tensor, implements


def unflatten_heads(x: Tensor, heads: int) -> Tensor:
    """[B, N, heads * d] -> [B, heads, N, d]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def flatten_heads(x: Tensor) -> Tensor:
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1)


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, bias: Tensor | None, causal_from: int | None
) -> Tensor:
    """[B, heads, N, d]; keys and values may have fewer heads. ``causal_from``: the position of the first query."""
    if k.shape[1] != q.shape[1]:
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = (q * math.sqrt(scale)) @ (k * math.sqrt(scale)).mT
    if causal_from is not None:
        rows = torch.arange(q.shape[2], device=q.device)[:, None] + causal_from
        scores = scores.masked_fill(torch.arange(k.shape[2], device=q.device)[None] > rows, -math.inf)
    if bias is not None:
        scores = scores.masked_fill(~bias, -math.inf) if bias.dtype == torch.bool else scores + bias
    return scores.softmax(-1) @ v


@implements("Attention")
def run_attention(
    call: OperatorCall, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None,
    past_k: Tensor | None = None, past_v: Tensor | None = None, lengths: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert not call.get("softcap", 0.0) and lengths is None and call.outputs < 4, "this Attention is not implemented"
    flat = q.ndim == 3
    if flat:
        q = unflatten_heads(q, call.attrs["q_num_heads"])
        k, v = (unflatten_heads(x, call.attrs["kv_num_heads"]) for x in (k, v))
    before = 0
    if past_k is not None and past_v is not None:
        before = past_k.shape[2]
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    scale = call.get("scale", 1 / math.sqrt(q.shape[-1]))
    out = scaled_dot_product_attention(q, k, v, scale, mask, before if call.get("is_causal", 0) else None)
    return (flatten_heads(out) if flat else out), k, v


@implements("Attention", domain=MICROSOFT)
def run_packed_attention(
    call: OperatorCall, x: Tensor, weight: Tensor, bias: Tensor | None = None, mask: Tensor | None = None,
    past: Tensor | None = None, added: Tensor | None = None,
) -> Tensor:  # fmt: skip
    assert past is None and not call.get("do_rotary", 0), "this Attention is not implemented"
    heads = call.attrs["num_heads"]
    sizes = list(call.get("qkv_hidden_sizes", [weight.shape[1] // 3] * 3))
    qkv = x @ weight if bias is None else x @ weight + bias
    q, k, v = (unflatten_heads(part, heads) for part in torch.split(qkv, sizes, -1))
    mask_bias = key_mask_bias(mask, call.get("mask_filter_value", -10000.0), q, x.shape[1])
    bias_sum = mask_bias if added is None else added if mask_bias is None else mask_bias + added
    scale = call.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    return flatten_heads(
        scaled_dot_product_attention(q, k, v, scale, bias_sum, 0 if call.get("unidirectional", 0) else None)
    )


def key_mask_bias(mask: Tensor | None, value: float, q: Tensor, keys: int) -> Tensor | None:
    """What com.microsoft's key masks (1: look) add to scores."""
    if mask is None:
        return None
    if mask.ndim == 1:
        assert len(mask) == len(q), "this mask of an Attention is not implemented"
        mask = torch.arange(keys, device=mask.device)[None] < mask[:, None]
    attended = mask.to(torch.bool)
    attended = attended[:, None, None] if attended.ndim == 2 else attended[:, None] if attended.ndim == 3 else attended
    return torch.where(attended, 0.0, value).to(q.dtype)


@implements("MultiHeadAttention", domain=MICROSOFT)
def run_multi_head_attention(
    call: OperatorCall, q: Tensor, k: Tensor | None = None, v: Tensor | None = None, bias: Tensor | None = None,
    mask: Tensor | None = None, added: Tensor | None = None, past_k: Tensor | None = None, past_v: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    assert k is not None and v is not None and q.ndim == 3, "packed inputs of MultiHeadAttention are not implemented"
    heads = call.attrs["num_heads"]
    parts = [q, k, v]
    if bias is not None:
        starts = [0, q.shape[-1], 2 * q.shape[-1]]
        parts = [
            x + bias[s : s + x.shape[-1] * (x.shape[2] if x.ndim == 4 else 1)] if x.ndim == 3 else x
            for x, s in zip(parts, starts, strict=True)
        ]
    q, k, v = (unflatten_heads(x, heads) if x.ndim == 3 else x for x in parts)
    if past_k is not None and past_v is not None:
        k, v = torch.cat([past_k, k], 2), torch.cat([past_v, v], 2)
    mask_bias = key_mask_bias(mask, call.get("mask_filter_value", -10000.0), q, k.shape[2])
    bias_sum = mask_bias if added is None else added if mask_bias is None else mask_bias + added
    scale = call.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    causal = k.shape[2] - q.shape[2] if call.get("unidirectional", 0) else None
    return flatten_heads(scaled_dot_product_attention(q, k, v, scale, bias_sum, causal)), k, v


@implements("GroupQueryAttention", domain=MICROSOFT)
def run_group_query_attention(
    call: OperatorCall, q: Tensor, k: Tensor | None, v: Tensor | None, past_k: Tensor | None, past_v: Tensor | None,
    lengths: Tensor, total: Tensor, cos: Tensor | None = None, sin: Tensor | None = None,
    positions: Tensor | None = None, added: Tensor | None = None, sink: Tensor | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Over a whole sequence: what a decoder is trained on. ``lengths``: [B], the keys of each row less one."""
    assert past_k is None or not past_k.shape[2], "a GroupQueryAttention with earlier keys is not implemented"
    options = ("softcap", "smooth_softmax", "k_quant_type", "v_quant_type")
    assert (
        sink is None
        and not any(call.get(name, 0) not in (0, 0.0, "NONE") for name in options)
        and (call.get("local_window_size", -1) == -1)
    ), "this GroupQueryAttention is not implemented"
    heads, groups = call.attrs["num_heads"], call.attrs["kv_num_heads"]
    if k is None or v is None:
        width = q.shape[-1] // (heads + 2 * groups)
        q, k, v = torch.split(q, [heads * width, groups * width, groups * width], -1)
    q, k, v = unflatten_heads(q, heads), unflatten_heads(k, groups), unflatten_heads(v, groups)
    if call.get("do_rotary", 0) and cos is not None and sin is not None:
        rows = torch.arange(q.shape[2], device=q.device)[None] if positions is None else positions
        rotary_call = OperatorCall(call.op, call.version, {"interleaved": call.get("rotary_interleaved", 0)})
        q, k = (apply_rotary_embedding(x, cos, sin, rows, 0, rotary_call) for x in (q, k))
    mask_bias = key_mask_bias(lengths.reshape(-1) + 1, -math.inf, q, k.shape[2])
    bias_sum = mask_bias if added is None else mask_bias + added if mask_bias is not None else added
    scale = call.get("scale", 0.0) or 1 / math.sqrt(q.shape[-1])
    return flatten_heads(scaled_dot_product_attention(q, k, v, scale, bias_sum, 0)), k, v


@implements("RotaryEmbedding")
def run_rotary_embedding(
    call: OperatorCall, x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None = None
) -> Tensor:
    return apply_rotary_embedding(x, cos, sin, positions, call.get("num_heads", 0), call)


@implements("RotaryEmbedding", domain=MICROSOFT)
def run_microsoft_rotary_embedding(
    call: OperatorCall, x: Tensor, positions: Tensor, cos: Tensor, sin: Tensor
) -> Tensor:
    if positions.ndim == 1:  # an offset
        count = x.shape[1] if x.ndim == 3 else x.shape[2]
        positions = (positions + torch.arange(count, device=positions.device))[None].expand(x.shape[0], -1)
    heads = call.get("num_heads", 0)
    if x.ndim == 3 and not heads:
        heads = x.shape[-1] // (2 * cos.shape[-1])
    return apply_rotary_embedding(x, cos, sin, positions, heads, call)


def apply_rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor | None, heads: int, call: OperatorCall
) -> Tensor:
    is_flat = x.ndim == 3
    heads_first = unflatten_heads(x, heads) if is_flat else x
    cos, sin = ((t if positions is None else t[positions]).unsqueeze(1) for t in (cos, sin))
    width = call.get("rotary_embedding_dim", 0) or 2 * cos.shape[-1]
    rotated_part, rest = heads_first[..., :width], heads_first[..., width:]
    cos, sin = cos[..., : width // 2], sin[..., : width // 2]
    if call.get("interleaved", 0):
        a, b = rotated_part[..., 0::2], rotated_part[..., 1::2]
        rotated = torch.stack([a * cos - b * sin, b * cos + a * sin], -1).flatten(-2)
    else:
        a, b = rotated_part[..., : width // 2], rotated_part[..., width // 2 :]
        rotated = torch.cat([a * cos - b * sin, b * cos + a * sin], -1)
    result = torch.cat([rotated, rest], -1)
    return flatten_heads(result) if is_flat else result
