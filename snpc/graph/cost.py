"""What a model costs in multiply-accumulates, from shapes and the operator table, without running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from snpc.ops import Blocked, Letters, OpCall, attention_form, attention_geometry, letters_of, lookup

LetterSizes = dict[str, int]


def contraction_sizes(call: OpCall, domain: str) -> Iterator[tuple[str, Letters, LetterSizes]]:
    """(part, letters, size of each letter) of every contraction in a node; the product of the sizes is its MACs."""
    spec = lookup(domain, call.op)
    if spec.kind == "attention":
        yield from attention_contractions(call, domain)
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
            if len(call.out_shapes[0]) != len(letters.out):
                return  # its shape is not known
            sizes |= dict(zip(letters.out, call.out_shapes[0], strict=True))
            sizes["I"] = call.shape(right)[letters.right.index("I")]
        yield "", letters, sizes


def letter_sizes(letters: Letters, left: tuple[int, ...], right: tuple[int, ...]) -> LetterSizes:
    sizes: LetterSizes = {}
    for term, shape in ((letters.left, left), (letters.right, right)):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def attention_contractions(call: OpCall, domain: str) -> Iterator[tuple[str, Letters, LetterSizes]]:
    shape = attention_geometry(call, domain)
    if shape is None:
        return
    if attention_form(call, domain).packed == "weight":
        width, columns = call.shape(1)
        yield (
            "projection",
            Letters("aMK", "KN", "aMN"),
            {"a": shape.batch, "M": shape.length, "K": width, "N": columns},
        )
    sizes = {"a": shape.batch, "b": shape.heads, "M": shape.length, "N": shape.kv_length, "K": shape.width}
    yield "scores", Letters("abMK", "abNK", "abMN"), dict(sizes)
    yield "context", Letters("abMK", "abKN", "abMN"), {**sizes, "K": shape.kv_length, "N": shape.value_width}


def count_macs(sizes: Mapping[str, int]) -> int:
    return int(np.prod(list(sizes.values()), dtype=np.float64))
