"""Fused attention: scores, softmax and context in one node."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from snpc.ops.spec import Call, OpSpec, Shape

MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class AttentionForm:
    """Where a fused node holds its parts. ``masks`` say which keys count: true, one, or not far below zero."""

    query: int
    key: int
    value: int
    bias: int | None
    packed_weight: int | None
    score_inputs: tuple[int, ...]
    other_inputs: tuple[int, ...]
    masks: tuple[int, ...]


ATTENTION = AttentionForm(0, 1, 2, None, None, (3,), (4, 5, 6), (3,))
MULTIHEAD = AttentionForm(0, 1, 2, 3, None, (5,), (4, 6, 7, 8, 9), (4, 5))
PACKED = AttentionForm(0, 0, 0, 2, 1, (5,), (3, 4, 6), (3,))

FORMS = {("", "Attention"): ATTENTION, (MICROSOFT, "MultiHeadAttention"): MULTIHEAD, (MICROSOFT, "Attention"): PACKED}


def form(domain: str, op: str) -> AttentionForm:
    return FORMS[(domain, op)]


def head_counts(call: Call) -> tuple[int, int]:
    """(query heads, key heads) of a node whose inputs are [B,N,H*D]; (0, 0) where they are [B,H,N,D]."""
    if "num_heads" in call.attrs:
        return int(call.attrs["num_heads"]), int(call.attrs["num_heads"])
    return int(call.attrs.get("q_num_heads", 0)), int(call.attrs.get("kv_num_heads", 0))


def packed_sizes(call: Call) -> tuple[int, int, int]:
    """Widths of Q, K and V in com.microsoft.Attention's merged weight."""
    sizes = call.attrs.get("qkv_hidden_sizes")
    if sizes:
        return int(sizes[0]), int(sizes[1]), int(sizes[2])
    third = call.shape(1)[1] // 3
    return third, third, third


def merged_sizes(call: Call, domain: str) -> tuple[int, int, int]:
    """Widths of Q, K and V in what a node holds of all three."""
    if form(domain, call.op).packed_weight is not None:
        return packed_sizes(call)
    return call.shape(0)[-1], call.shape(1)[-1], call.shape(2)[-1]


def _multihead_shape(call: Call) -> list[Shape]:
    query, value = call.shape(0), call.shape(2)
    return [(query[0], query[1], value[-1])]


def _packed_shape(call: Call) -> list[Shape]:
    data = call.shape(0)
    return [(data[0], data[1], packed_sizes(call)[2])]


@dataclass(frozen=True)
class Widths:
    """Heads and widths of a fused node after the cut."""

    heads: int
    kv_heads: int
    query: int
    value: int


def refit(call: Call, domain: str, new: Widths) -> dict[str, Any]:
    """Attributes that spell heads or widths."""
    if "num_heads" not in call.attrs and "q_num_heads" not in call.attrs:
        return {}
    if domain != MICROSOFT:
        return {"q_num_heads": new.heads, "kv_num_heads": new.kv_heads}
    attrs: dict[str, Any] = {"num_heads": new.heads}
    if form(domain, call.op).packed_weight is not None:
        attrs["qkv_hidden_sizes"] = [new.heads * new.query] * 2 + [new.heads * new.value]
    return attrs


def _embedding_shape(call: Call) -> list[Shape]:
    """[batch, length, width], then the mask's lengths."""
    batch, length = call.shape(0)
    return [(batch, length, call.shape(2)[1]), (batch,), (batch, length, call.shape(2)[1])][: len(call.outs)]


def entries() -> list[OpSpec]:
    says = "Q and K join per head and width; V passes per head; the scale is an attribute that is always written"
    return [
        OpSpec(
            "EmbedLayerNormalization",
            "opaque",
            "pinned: several tables and a normalisation in one node",
            domain=MICROSOFT,
            out_shapes=_embedding_shape,
            typed_by=2,
            lengths=(1,),
            reason="several tables and a normalisation in one node",
        ),
        OpSpec("Attention", "attention", says),
        OpSpec("MultiHeadAttention", "attention", says, domain=MICROSOFT, out_shapes=_multihead_shape),
        OpSpec("Attention", "attention", says, domain=MICROSOFT, out_shapes=_packed_shape),
    ]
