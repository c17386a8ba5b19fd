"""Fused attention: scores, softmax and context in one node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from snpc.ops.spec import MICROSOFT, OpCall, OpSpec
from snpc.types import Shape

PackedKind = Literal["weight", "columns", ""]


@dataclass(frozen=True)
class AttentionForm:
    """The inputs of a fused node by role: indices, () or None where it has no such input.

    ``packed``: Q, K and V are columns of one matrix that the node multiplies by ("weight": input 1) or of one input
    ("columns", where no key is given). ``past``/``present``: inputs and outputs that hold the keys and values of
    earlier steps; one index where both lie in one tensor. ``equal``: keys and values have one width. ``multiple``:
    widths that the kernels take. ``masks`` say which keys count: true, one, or not far below zero. ``one_row``: the
    tokens of all samples lie in one row, without a batch axis. ``one_head_size``: what runs such models
    (onnxruntime-genai) takes one width for the caches of all layers. ``norms``: gains of norms on the heads of queries
    and of keys.
    """

    query: int = 0
    key: int = 1
    value: int = 2
    bias: int | None = None
    packed: PackedKind = ""
    scores: int | None = None
    past: tuple[int, ...] = ()
    present: tuple[int, ...] = (1, 2)
    rotary: tuple[int, ...] = ()
    equal: bool = False
    multiple: int = 1
    masks: tuple[int, ...] = ()
    one_row: bool = False
    one_head_size: bool = False
    norms: tuple[int, ...] = ()

    def others(self, call: OpCall) -> list[int]:
        """Inputs that are not part of the algebra: masks, lengths, and inputs of newer versions."""
        taken = {self.query, self.bias, self.scores, *self.past, *self.rotary}
        taken |= {1} if self.packed == "weight" else {self.key, self.value}
        return [k for k in range(len(call.shapes)) if k not in taken]


ATTENTION_FORMS = {
    ("", "Attention"): AttentionForm(scores=3, past=(4, 5), masks=(3,)),
    (MICROSOFT, "MultiHeadAttention"): AttentionForm(bias=3, scores=5, past=(6, 7), masks=(4, 5)),
    (MICROSOFT, "DecoderMaskedMultiHeadAttention"): AttentionForm(
        bias=10, scores=4, past=(5, 6), equal=True, masks=(3, 4)
    ),
    (MICROSOFT, "PackedMultiHeadAttention"): AttentionForm(bias=3, scores=6, one_row=True),
    (MICROSOFT, "GroupQueryAttention"): AttentionForm(
        packed="columns",
        scores=10,
        past=(3, 4),
        rotary=(7, 8),
        equal=True,
        multiple=8,
        one_head_size=True,
        norms=(14, 15),
    ),
    (MICROSOFT, "Attention"): AttentionForm(
        key=0, value=0, bias=2, packed="weight", scores=5, past=(4,), present=(1,), masks=(3,)
    ),
}


ROTARY_TABLES = {(MICROSOFT, "RotaryEmbedding"): (2, 3), ("", "RotaryEmbedding"): (1, 2)}


def attention_form(call: OpCall, domain: str) -> AttentionForm:
    """The form of one node: packed columns only where it has no key of its own; com.microsoft's kernels
    want keys and values of one shape where they are split into heads already, and behind a past."""
    form = ATTENTION_FORMS[domain, call.op]
    if form.packed == "columns" and call.has(form.key):
        form = replace(form, packed="")
    if domain != MICROSOFT or form.packed:
        return form
    split = call.has(form.key) and len(call.shape(form.key)) == 4
    past = bool(form.past) and call.has(form.past[0])
    return replace(form, equal=form.equal or split or past)


@dataclass(frozen=True)
class AttentionGeometry:
    """Sizes of a fused node: [batch, heads, length, width] of the query, and what keys and values differ in."""

    batch: int
    heads: int
    kv_heads: int
    length: int
    kv_length: int
    width: int
    value_width: int

    @property
    def columns(self) -> tuple[int, int, int]:
        """Widths of Q, K and V laid flat."""
        return self.heads * self.width, self.kv_heads * self.width, self.kv_heads * self.value_width


def required_outputs(domain: str, op_type: str, inputs: Sequence[object | None]) -> tuple[int, ...]:
    """Outputs that onnxruntime wants of a node with these ``inputs`` (None: left out) even if nothing reads them:
    caches come out where they go in."""
    form = ATTENTION_FORMS.get((domain, op_type))
    takes_past = form is not None and any(k < len(inputs) and inputs[k] is not None for k in form.past)
    return form.present if form is not None and takes_past else ()


def partly_written(domain: str, op_type: str, attributes: Mapping[str, Any]) -> tuple[int, ...]:
    """Outputs of a node whose last rows stay unwritten where few tokens were seen: caches as long as a sliding window.

    What lies there differs from run to run.
    """
    form = ATTENTION_FORMS.get((domain, op_type))
    return form.present if form is not None and attributes.get("sliding_window_cache", 0) else ()


def rolling_pasts(domain: str, op_type: str, attributes: Mapping[str, Any]) -> dict[int, int]:
    """Inputs of a node that are caches of a sliding window, each with the fewest tokens that it has room for."""
    form = ATTENTION_FORMS.get((domain, op_type))
    if form is None or not attributes.get("sliding_window_cache", 0):
        return {}
    return dict.fromkeys(form.past, max(int(attributes.get("local_window_size", 0)), 0))


def rotary_tables(domain: str, op_type: str) -> tuple[int, ...]:
    """The inputs of a node that are tables of cosines and sines."""
    if (domain, op_type) in ATTENTION_FORMS:
        return ATTENTION_FORMS[domain, op_type].rotary
    return ROTARY_TABLES.get((domain, op_type), ())


def head_counts(call: OpCall) -> tuple[int, int]:
    """(query heads, key heads) of a node whose inputs are [B,N,H*D]; (0, 0) where they are [B,H,N,D]."""
    heads = call.attrs.get("num_heads", call.attrs.get("q_num_heads", 0))
    kv_heads = call.attrs.get("kv_num_heads", heads)
    if not (isinstance(heads, int) and isinstance(kv_heads, int)):  # attributes of a damaged file
        return 0, 0
    return heads, kv_heads


def attention_geometry(call: OpCall, domain: str) -> AttentionGeometry | None:
    """The sizes of a fused node; None where an input is missing or packed in an unsupported way, or where the numbers
    of a damaged node make no sense."""
    shape = attention_form(call, domain)
    heads, kv_heads = head_counts(call)
    if not call.has(shape.query) or (len(call.shape(shape.query)) < 4 and min(heads, kv_heads) < 1):
        return None
    if shape.packed and len(call.shape(shape.query)) != 3:
        return None
    query = (1,) * (3 - len(call.shape(shape.query))) + call.shape(shape.query)
    if shape.packed == "weight":
        widths = packed_weight_widths(call)
        if widths is None:
            return None
        return AttentionGeometry(query[0], heads, heads, query[1], query[1], widths[0] // heads, widths[2] // heads)
    if shape.packed == "columns":
        width = query[2] // (heads + 2 * kv_heads)
        return AttentionGeometry(query[0], heads, kv_heads, query[1], query[1], width, width)
    if not (call.has(shape.key) and call.has(shape.value)) or len(query) > 4:
        return None
    key, value = call.shape(shape.key), call.shape(shape.value)
    ranks = (2,) if shape.one_row else (4,) if len(query) == 4 else (3, 4)
    if len(key) not in ranks or len(value) not in ranks:
        return None
    if len(query) == 4:
        heads, kv_heads = query[1], key[1]
    length, width = (query[2], query[3]) if len(query) == 4 else (query[1], query[2] // heads)
    kv_length = key[-2]
    return AttentionGeometry(
        query[0], heads, kv_heads, length, kv_length, width, value[3] if len(value) == 4 else value[-1] // kv_heads
    )


def packed_weight_widths(call: OpCall) -> tuple[int, int, int] | None:
    """Widths of Q, K and V in com.microsoft.Attention's merged weight; None where it is none."""
    sizes, weight = call.attrs.get("qkv_hidden_sizes"), call.shape(1)
    if len(weight) != 2:
        return None
    if sizes:
        return (int(sizes[0]), int(sizes[1]), int(sizes[2])) if len(sizes) == 3 and sum(sizes) == weight[1] else None
    third = weight[1] // 3
    return third, third, third


def qkv_widths(call: OpCall, domain: str) -> tuple[int, int, int]:
    """Widths of Q, K and V in what a node holds of all three."""
    sizes = attention_geometry(call, domain)
    assert sizes is not None
    return sizes.columns


def _attention_shapes(domain: str) -> Any:
    """Output shapes of com.microsoft's nodes: the context as flat as the query, then keys and values as they grow."""

    def shapes(call: OpCall) -> list[Shape]:
        form, sizes = attention_form(call, domain), attention_geometry(call, domain)
        if sizes is None:
            return []
        width = sizes.heads * sizes.value_width
        query = call.shape(form.query)
        context = (*query[:-1], width) if len(query) < 4 else (query[0], query[2], width)
        past = call.shape(form.past[0]) if form.past and call.has(form.past[0]) else None
        length = (past[-2] if past else 0) + (0 if _shares_buffer(call) else sizes.kv_length)
        key = (sizes.batch, sizes.kv_heads, length, sizes.width)
        if len(form.present) == 1:
            return [context, (2, *key)][: len(call.out_shapes)]
        return [context, key, (*key[:3], sizes.value_width)][: len(call.out_shapes)]

    return shapes


def _shares_buffer(call: OpCall) -> bool:
    return bool(call.attrs.get("past_present_share_buffer", 0))


def _resize_attention_attributes(
    call: OpCall, domain: str, parts: Mapping[str, Shape], cuts: Mapping[int, Shape]
) -> Mapping[str, Any]:
    """Attributes that hold heads or widths, after the cut. Heads of keys go with those of the query; a single one stays
    for those that are left."""
    _, heads, _, width = parts["query"]
    old, old_kv = head_counts(call)
    kv_heads = max(heads * old_kv // old, 1) if old else 0
    if "q_num_heads" in call.attrs:
        return {"q_num_heads": heads, "kv_num_heads": kv_heads}
    if "num_heads" not in call.attrs:
        return {}
    attrs: dict[str, Any] = {"num_heads": heads}
    if "kv_num_heads" in call.attrs:
        attrs["kv_num_heads"] = kv_heads
    if attention_form(call, domain).packed == "weight":
        attrs["qkv_hidden_sizes"] = [heads * width] * 2 + [heads * parts["value"][3]]
    return attrs


def attention_entries() -> list[OpSpec]:
    says = "Q and K join per head and width; V passes per head; the scale is an attribute that is always written"
    grouped = "as Attention; keys and values are equally wide, in multiples of 8 channels, or 16 with rotary positions"
    names = {
        "MultiHeadAttention": says,
        "DecoderMaskedMultiHeadAttention": says,
        "PackedMultiHeadAttention": f"{says}; the tokens of all samples lie in one row",
        "GroupQueryAttention": grouped,
        "Attention": f"{says}; its weight's columns are cut",
    }
    return [
        OpSpec("Attention", "attention", says, resize_head_attributes=_resize_attention_attributes),
        *(
            OpSpec(
                name,
                "attention",
                text,
                domain=MICROSOFT,
                resize_head_attributes=_resize_attention_attributes,
                out_shapes=_attention_shapes(MICROSOFT),
            )
            for name, text in names.items()
        ),
    ]
