"""Contractions, written as Einstein sums: the letters of the two operands that do not reach the output are summed."""

from __future__ import annotations

from string import ascii_letters

from snpc.ops.spec import MICROSOFT, SHAPE_MISMATCH, Blocked, Letters, OpCall, OpSpec
from snpc.types import Shape


def matmul_letters(left_rank: int, right_rank: int) -> Letters:
    """numpy's matmul: batch axes are aligned from the right; vectors have no row (or column) axis."""
    batch = max(left_rank, right_rank) - 2
    names = ascii_letters[: max(batch, 0)]
    left = ("" if left_rank == 1 else names[batch - (left_rank - 2) :] + "M") + "K"
    right = ("" if right_rank == 1 else names[batch - (right_rank - 2) :]) + "K" + ("" if right_rank == 1 else "N")
    out = names + ("" if left_rank == 1 else "M") + ("" if right_rank == 1 else "N")
    return Letters(left, right, out)


def _matmul(call: OpCall) -> Letters:
    return matmul_letters(len(call.shape(0)), len(call.shape(1)))


def _fused_matmul(call: OpCall) -> Letters:
    """com.microsoft.FusedMatMul: attributes transpose the operands."""
    letters = _matmul(call)
    left, right = (
        _as_stored(term, bool(call.attrs.get(f"trans{side}", 0)), bool(call.attrs.get(f"transBatch{side}", 0)))
        for side, term in (("A", letters.left), ("B", letters.right))
    )
    return Letters(left, right, letters.out)


def _as_stored(term: str, last_two: bool, batch: bool) -> str:
    """The letters of an operand as it is stored: ``batch`` moves its first axis behind the other batch axes, then
    ``last_two`` swaps the last two."""
    if last_two and len(term) > 1:
        term = term[:-2] + term[-1] + term[-2]
    return term[-2] + term[:-2] + term[-1] if batch and len(term) > 2 else term


def _gemm(call: OpCall) -> Letters:
    left = "KM" if call.attrs.get("transA", 0) else "MK"
    right = "NK" if call.attrs.get("transB", 0) else "KN"
    return Letters(left, right, "MN")


def _gemm_bias(call: OpCall) -> str:
    rank = len(call.shape(2))
    if rank > 2:
        raise Blocked(0, SHAPE_MISMATCH)
    return "MN"[2 - rank :]


def letters_of(spec: OpSpec, call: OpCall) -> Letters:
    """The sum of products that a node does. Raises Blocked where its operands do not fit it, or each other."""
    assert spec.letters is not None
    left, right = (call.shape(k) for k in spec.operands)
    try:
        letters = spec.letters(call)
    except IndexError:
        raise Blocked(0, SHAPE_MISMATCH) from None
    ranks = len(letters.left), len(letters.right)
    out = call.out_shapes[0] if call.out_shapes else ()
    if ranks != (len(left), len(right)) or (out and len(letters.out) != len(out)):
        raise Blocked(0, SHAPE_MISMATCH)
    sizes = dict(zip(letters.left, left, strict=True))
    for letter, size in zip(letters.right, right, strict=True) if not letters.windowed else ():
        summed = letter in letters.left and letter not in letters.out
        other = sizes.get(letter, size)
        if other != size and (summed or 1 not in (other, size)):
            raise Blocked(0, SHAPE_MISMATCH)
    return letters


def parse_einsum(equation: str, shapes: list[Shape]) -> list[str]:
    """Terms of an equation with every ellipsis spelled out, output last."""
    terms, _, out = equation.replace(" ", "").partition("->")
    parts = terms.split(",")
    if not out and "->" not in equation:
        flat = "".join(parts).replace(".", "")
        out = ("..." if "..." in equation else "") + "".join(sorted(c for c in set(flat) if flat.count(c) == 1))
    free = [c for c in ascii_letters if c not in equation]
    depth = max(
        (
            len(shape) - len(part.replace("...", ""))
            for part, shape in zip(parts, shapes, strict=False)
            if "..." in part
        ),
        default=0,
    )
    dots = "".join(free[:depth])

    def spell(part: str, rank: int) -> str:
        count = rank - len(part.replace("...", ""))
        return part.replace("...", dots[depth - count :] if count else "")

    spelled = [spell(part, len(shape)) for part, shape in zip(parts, shapes, strict=False)]
    return [*spelled, out.replace("...", dots)]


def _einsum(call: OpCall) -> Letters:
    if "equation" not in call.attrs:
        raise Blocked(0, "it has no equation")
    shapes = [call.shape(k) for k in range(len(call.shapes))]
    terms = parse_einsum(str(call.attrs["equation"]), shapes)
    if len(terms) != 3:
        raise Blocked(0, "a product of other than two tensors")
    if any(len(set(term)) != len(term) for term in terms):
        raise Blocked(0, "a letter occurs twice in one term")
    return Letters(terms[0], terms[1], terms[2])


def _spatial_letters(call: OpCall) -> tuple[str, str]:
    """Letters of the axes behind batch and channels, of the data and of the filter."""
    count = len(call.shape(0)) - 2
    return ascii_letters[:count], "".join("KLMNOP"[k] for k in range(count))


def _conv(call: OpCall) -> Letters:
    spatial, kernel = _spatial_letters(call)
    return Letters("BI" + spatial, "CI" + kernel, "BC" + spatial, windowed=spatial)


def _conv_transpose(call: OpCall) -> Letters:
    spatial, kernel = _spatial_letters(call)
    return Letters("BI" + spatial, "IC" + kernel, "BC" + spatial, windowed=spatial)


def letter_sizes(letters: Letters, left: Shape, right: Shape) -> dict[str, int]:
    """The size of each letter of a product of operands of these shapes; of a broadcast axis, the larger one."""
    sizes: dict[str, int] = {}
    for term, shape in ((letters.left, left), (letters.right, right)):
        for letter, size in zip(term, shape, strict=True):
            sizes[letter] = max(size, sizes.get(letter, 1))
    return sizes


def _matmul_shape(call: OpCall) -> list[Shape]:
    letters = _fused_matmul(call)
    sizes = letter_sizes(letters, call.shape(0), call.shape(1))
    return [tuple(sizes[letter] for letter in letters.out)]


def _conv_attrs(old: OpCall, new: OpCall) -> dict[str, int]:
    """A depthwise convolution has one group per channel, however many stay."""
    if old.has(0) and new.has(0) and int(old.attrs.get("group", 1)) == old.shape(0)[1] > 1:
        return {"group": new.shape(0)[1]}
    return {}


def contraction_entries() -> list[OpSpec]:
    def bias_channel(call: OpCall) -> str:
        return "C"

    return [
        OpSpec("MatMul", "contraction", "x @ y: the last axis of x joins the last but one of y", letters=_matmul),
        OpSpec(
            "Gemm",
            "contraction",
            "as MatMul, with transposes and a bias",
            letters=_gemm,
            bias=2,
            bias_letters=_gemm_bias,
        ),
        OpSpec(
            "Einsum",
            "contraction",
            "letters that do not reach the output are summed; of other than two tensors it is spelled out first",
            letters=_einsum,
        ),
        OpSpec(
            "Conv",
            "contraction",
            "input channels are summed, output channels come from the weight; in groups, each keeps as many; depthwise "
            "ones are per channel",
            letters=_conv,
            windowed=True,
            bias=2,
            bias_letters=bias_channel,
            resize_attributes=_conv_attrs,
        ),
        OpSpec(
            "ConvTranspose",
            "contraction",
            "as Conv, with the weight's axes swapped",
            letters=_conv_transpose,
            windowed=True,
            bias=2,
            bias_letters=bias_channel,
            resize_attributes=_conv_attrs,
        ),
        OpSpec(
            "FusedMatMul",
            "contraction",
            "as MatMul, with transposes and a factor",
            domain=MICROSOFT,
            letters=_fused_matmul,
            out_shapes=_matmul_shape,
        ),
        OpSpec(
            "FusedConv",
            "contraction",
            "as Conv, then an addition and an activation",
            domain=MICROSOFT,
            letters=_conv,
            windowed=True,
            bias=2,
            bias_letters=bias_channel,
            summand=3,
            resize_attributes=_conv_attrs,
            out_shapes=lambda call: [_conv_shape(call)],
            has_activation=True,
        ),
        OpSpec(
            "FusedGemm",
            "contraction",
            "as Gemm, then an activation",
            domain=MICROSOFT,
            letters=_gemm,
            bias=2,
            bias_letters=_gemm_bias,
            out_shapes=lambda call: [_gemm_shape(call)],
            has_activation=True,
        ),
    ]


def _conv_shape(call: OpCall) -> Shape:
    """Pads are given, or nothing is padded, or outputs are as many as strides."""
    data, weight = call.shape(0), call.shape(1)
    rank = len(data) - 2
    strides = call.attrs.get("strides") or [1] * rank
    spread = call.attrs.get("dilations") or [1] * rank
    pads = call.attrs.get("pads") or [0] * 2 * rank
    same = str(call.attrs.get("auto_pad", "NOTSET")).startswith("SAME")
    sizes = []
    for k in range(rank):
        window = (weight[2 + k] - 1) * spread[k] + 1
        padded = data[2 + k] + pads[k] + pads[k + rank]
        sizes.append(-(-data[2 + k] // strides[k]) if same else (padded - window) // strides[k] + 1)
    return (data[0], weight[0], *sizes)


def _gemm_shape(call: OpCall) -> Shape:
    letters = _gemm(call)
    sizes = dict(zip(letters.left, call.shape(0), strict=True)) | dict(zip(letters.right, call.shape(1), strict=True))
    return (sizes["M"], sizes["N"])
