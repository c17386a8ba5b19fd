"""The operator table: what snpc knows about operators is in this package and nowhere else.

``lookup`` has an answer for every operator: one without an entry is opaque, and its reason says so.

Files
  attention      Fused attention: scores, softmax and context in one node.
  contraction    Contractions, written as Einstein sums: the letters of the two operands that do not reach the output
                 are summed.
  demands        What operators demand of the sizes of their inputs: equal sizes, sizes that reach an index, multiples.
  discontinuous  Operators whose output jumps where floats that are equal up to rounding change their order or round
                 apart.
  indexing       Reading and writing positions that an index tensor names.
  movement       Movement: how label arrays move through operators that only move positions, and how their parameters
                 are repaired.
  names          Names of the operators that snpc itself writes into a graph: standard, and in every opset since 9;
                 those that only token reduction writes since 13.
  normalization  Operators that take statistics along axes: normalizations, reductions, pooling; and those that read
                 shapes only.
  opaque         Operators that snpc knows and will not look through, each with its reason.
  pointwise      Operators that work on one position at a time.
  quantization/  Operators on quantized values: what they cost, which of their inputs are weights, which float nodes
                 they stand for.
  rotary         Rotary positions in one node.
  routing        Routing of tokens to experts: positions chosen along an axis, one-hot rows of them, and experts in one
                 node.
  single_node    What one node makes of inputs that are known: contents by onnx's reference implementation, types by its
                 inference.
  spec           The schema of the operator table.
"""

from __future__ import annotations

from functools import cache

from snpc.ops import names
from snpc.ops.attention import (
    ATTENTION_FORMS,
    AttentionForm,
    AttentionGeometry,
    attention_entries,
    attention_form,
    attention_geometry,
    head_counts,
    partly_written,
    qkv_widths,
    required_outputs,
    rolling_pasts,
    rotary_tables,
)
from snpc.ops.contraction import contraction_entries, letter_sizes, letters_of, matmul_letters, parse_einsum
from snpc.ops.demands import SizeDemand, unmet_demands
from snpc.ops.discontinuous import is_discontinuous
from snpc.ops.indexing import indexing_entries
from snpc.ops.movement import collapse_constant_axes, concat_axis, movement_entries, reshape_labels
from snpc.ops.names import (
    ADD,
    ARG_MAX,
    ATTENTION,
    CAST,
    CAST_LIKE,
    CLIP,
    CONCAT,
    CONSTANT,
    CONSTANT_OF_SHAPE,
    COS,
    CUMSUM,
    DEQUANTIZE_LINEAR,
    DIV,
    EINSUM,
    ELU,
    EQUAL,
    EXPAND,
    GATHER,
    GATHER_ND,
    GEMM,
    IDENTITY,
    LESS,
    LOG,
    LP_NORMALIZATION,
    MATMUL,
    MAX,
    MUL,
    MULTI_HEAD_ATTENTION,
    PAD,
    POW,
    QUANTIZE_LINEAR,
    RANGE,
    REDUCE_MAX,
    REDUCE_MEAN,
    REDUCE_SUM,
    REDUCTION_AXES_INPUT_SINCE,
    RESHAPE,
    SCATTER_ELEMENTS,
    SHAPE,
    SIMPLIFIED_LAYER_NORMALIZATION,
    SIN,
    SLICE,
    SOFTMAX,
    SPLIT,
    SQRT,
    SQUEEZE,
    SUB,
    TOPK,
    TRANSPOSE,
    TYPE_ATTRIBUTES,
    UNSQUEEZE,
    WHERE,
)
from snpc.ops.normalization import normalization_entries
from snpc.ops.opaque import SUBGRAPH, is_quantized_operator, opaque_entries
from snpc.ops.pointwise import pointwise_entries
from snpc.ops.quantization import (
    COMMUTING,
    DYNAMIC_QUANTIZERS,
    FILLING,
    KEEPS_SIGN,
    NOT_NEGATIVE,
    FloatForm,
    Layout,
    Operand,
    Packed,
    Plain,
    Quantized,
    QuantizedArray,
    QuantizedBias,
    common_block,
    dequantize_array,
    float_form,
    read_stored,
    write_stored,
)
from snpc.ops.rotary import RotaryForm, rotary_entries, rotary_form, rotated_pairs
from snpc.ops.routing import (
    EXPERTS_FORM,
    ExpertsGeometry,
    experts_geometry,
    most_chosen,
    one_hot_axis,
    routing_entries,
)
from snpc.ops.single_node import (
    InferenceContext,
    KnownTensor,
    evaluate_node,
    evaluate_single,
    infer_single,
    known_content,
)
from snpc.ops.spec import MICROSOFT, SHAPE_MISMATCH, SUMMED_OVER, Blocked, Labels, Letters, OpCall, OpSpec, TensorCut

__all__ = [
    "ADD",
    "ARG_MAX",
    "ATTENTION",
    "ATTENTION_FORMS",
    "CAST",
    "CAST_LIKE",
    "CLIP",
    "COMMUTING",
    "CONCAT",
    "CONSTANT",
    "CONSTANT_OF_SHAPE",
    "COS",
    "CUMSUM",
    "DEQUANTIZE_LINEAR",
    "DIV",
    "DYNAMIC_QUANTIZERS",
    "EINSUM",
    "ELU",
    "EQUAL",
    "EXPAND",
    "EXPERTS_FORM",
    "FILLING",
    "GATHER",
    "GATHER_ND",
    "GEMM",
    "IDENTITY",
    "KEEPS_SIGN",
    "LESS",
    "LOG",
    "LP_NORMALIZATION",
    "MATMUL",
    "MAX",
    "MICROSOFT",
    "MUL",
    "MULTI_HEAD_ATTENTION",
    "NOT_NEGATIVE",
    "PAD",
    "POW",
    "QUANTIZE_LINEAR",
    "RANGE",
    "REDUCE_MAX",
    "REDUCE_MEAN",
    "REDUCE_SUM",
    "REDUCTION_AXES_INPUT_SINCE",
    "RESHAPE",
    "SCATTER_ELEMENTS",
    "SHAPE",
    "SHAPE_MISMATCH",
    "SIMPLIFIED_LAYER_NORMALIZATION",
    "SIN",
    "SLICE",
    "SOFTMAX",
    "SPLIT",
    "SQRT",
    "SQUEEZE",
    "SUB",
    "SUBGRAPH",
    "SUMMED_OVER",
    "TOPK",
    "TRANSPOSE",
    "TYPE_ATTRIBUTES",
    "UNSQUEEZE",
    "WHERE",
    "AttentionForm",
    "AttentionGeometry",
    "Blocked",
    "ExpertsGeometry",
    "FloatForm",
    "InferenceContext",
    "KnownTensor",
    "Labels",
    "Layout",
    "Letters",
    "OpCall",
    "OpSpec",
    "Operand",
    "Packed",
    "Plain",
    "Quantized",
    "QuantizedArray",
    "QuantizedBias",
    "RotaryForm",
    "SizeDemand",
    "TensorCut",
    "attention_form",
    "attention_geometry",
    "collapse_constant_axes",
    "common_block",
    "concat_axis",
    "dequantize_array",
    "evaluate_node",
    "evaluate_single",
    "experts_geometry",
    "float_form",
    "head_counts",
    "infer_single",
    "is_discontinuous",
    "is_quantized_operator",
    "known_content",
    "letter_sizes",
    "letters_of",
    "lookup",
    "matmul_letters",
    "most_chosen",
    "names",
    "one_hot_axis",
    "operator_table",
    "parse_einsum",
    "partly_written",
    "qkv_widths",
    "read_stored",
    "required_outputs",
    "reshape_labels",
    "rolling_pasts",
    "rotary_form",
    "rotary_tables",
    "rotated_pairs",
    "unmet_demands",
    "write_stored",
]


@cache
def operator_table() -> dict[tuple[str, str], OpSpec]:
    table: dict[tuple[str, str], OpSpec] = {}
    families = (
        movement_entries,
        indexing_entries,
        contraction_entries,
        pointwise_entries,
        normalization_entries,
        attention_entries,
        rotary_entries,
        routing_entries,
        opaque_entries,
    )
    for entries in families:
        for spec in entries():
            key = (spec.domain, spec.name)
            if key in table:
                raise ValueError(f"two entries for operator {spec.domain}::{spec.name}")
            table[key] = spec
    return table


@cache
def lookup(domain: str, name: str) -> OpSpec:
    domain = "" if domain == "ai.onnx" else domain
    known = operator_table().get((domain, name))
    if known:
        return known
    label = f"{domain}.{name}" if domain else name
    return OpSpec(
        name, "opaque", "pinned: no entry", domain=domain, reason=f"no entry for {label} in the operator table"
    )
