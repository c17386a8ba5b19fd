"""What a model costs in multiply-accumulates, from shapes and the operator table, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from snpc.ops import lookup
from snpc.ops.attention import form, head_counts, packed_sizes
from snpc.ops.contraction import letters_of
from snpc.ops.spec import Blocked, Call, Letters

Sizes = dict[str, int]


def contraction_sizes(call: Call, domain: str) -> Iterator[tuple[str, Letters, Sizes]]:
    """(part, letters, size of each letter) of every sum of products that a node does; its MACs are their product."""
    spec = lookup(domain, call.op)
    if spec.kind == "attention":
        yield from attention_sizes(call, domain)
    elif spec.kind == "contraction" and spec.letters is not None:
        left, right = spec.operands
        if not (call.has(left) and call.has(right)):
            return
        try:
            letters = letters_of(spec, call)
        except Blocked:
            return
        sizes = letter_sizes(letters, call.shape(left), call.shape(right))
        if letters.windowed:
            if len(call.outs[0]) != len(letters.out):
                return  # its shape is not known
            sizes |= dict(zip(letters.out, call.outs[0], strict=True))
            sizes["I"] = call.shape(right)[letters.right.index("I")]
        yield "", letters, sizes


def letter_sizes(letters: Letters, left: tuple[int, ...], right: tuple[int, ...]) -> Sizes:
    sizes: Sizes = {}
    for term, shape in ((letters.left, left), (letters.right, right)):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def attention_sizes(call: Call, domain: str) -> Iterator[tuple[str, Letters, Sizes]]:
    shape = form(domain, call.op)
    if not call.has(shape.query):
        return
    heads, _ = head_counts(call)
    query = call.shape(shape.query)
    if shape.packed_weight is not None:
        q, _, v = packed_sizes(call)
        batch, length, width = query
        yield (
            "projection",
            Letters("aMK", "KN", "aMN"),
            {"a": batch, "M": length, "K": width, "N": call.shape(shape.packed_weight)[1]},
        )
        sizes = {"a": batch, "b": heads, "M": length, "N": length, "K": q // heads, "V": v // heads}
    else:
        if not (call.has(shape.key) and call.has(shape.value)):
            return
        key, value = call.shape(shape.key), call.shape(shape.value)
        if heads:
            sizes = {
                "a": query[0],
                "b": heads,
                "M": query[1],
                "N": key[1],
                "K": query[2] // heads,
                "V": value[2] // max(int(call.attrs.get("kv_num_heads", heads)), 1),
            }
        else:
            sizes = {"a": query[0], "b": query[1], "M": query[2], "N": key[2], "K": query[3], "V": value[3]}
    width = sizes.pop("V")
    yield "scores", Letters("abMK", "abNK", "abMN"), dict(sizes)
    yield "context", Letters("abMK", "abKN", "abMN"), {**sizes, "K": sizes["N"], "N": width}


def macs_of(sizes: Mapping[str, int]) -> int:
    return int(np.prod(list(sizes.values()), dtype=np.float64))
