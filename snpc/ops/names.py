"""Names of the operators that snpc itself writes into a graph: standard, and in every opset since 9; those that only
token reduction writes since 13."""

from __future__ import annotations

ADD = "Add"
ARG_MAX = "ArgMax"
ATTENTION = "Attention"  # com.microsoft: with the projections inside
CAST = "Cast"
CLIP = "Clip"
CAST_LIKE = "CastLike"
CONCAT = "Concat"
CONSTANT = "Constant"  # not written, but looked for while a file is loaded
CONSTANT_OF_SHAPE = "ConstantOfShape"
COS = "Cos"  # not written, but looked for
CUMSUM = "CumSum"
DEQUANTIZE_LINEAR = "DequantizeLinear"  # since opset 10
DIV = "Div"
EINSUM = "Einsum"
EQUAL = "Equal"
EXP = "Exp"
EXPAND = "Expand"
GATHER = "Gather"
GATHER_ND = "GatherND"
GEMM = "Gemm"
IDENTITY = "Identity"
LESS = "Less"
LOG = "Log"
LP_NORMALIZATION = "LpNormalization"
ELU = "Elu"
MATMUL = "MatMul"
MAX = "Max"
MIXTURE_OF_EXPERTS = "MoE"  # com.microsoft
MOD = "Mod"  # since opset 10
MUL = "Mul"
MULTI_HEAD_ATTENTION = "MultiHeadAttention"  # com.microsoft
PAD = "Pad"  # with its widths as an input since opset 11
QUANTIZE_LINEAR = "QuantizeLinear"  # since opset 10
POW = "Pow"  # not written, but looked for
RANGE = "Range"  # since opset 11
REDUCE_MAX = "ReduceMax"
REDUCE_MEAN = "ReduceMean"
REDUCE_SUM = "ReduceSum"
RESHAPE = "Reshape"
ROTARY_EMBEDDING = "RotaryEmbedding"  # com.microsoft
SCATTER_ELEMENTS = "ScatterElements"
SHAPE = "Shape"
SIMPLIFIED_LAYER_NORMALIZATION = "SimplifiedLayerNormalization"  # onnxruntime's
SIN = "Sin"  # not written, but looked for
SLICE = "Slice"
SOFTMAX = "Softmax"
SPLIT = "Split"
SQRT = "Sqrt"
SQUEEZE = "Squeeze"
SUB = "Sub"
TOPK = "TopK"
TRANSPOSE = "Transpose"
UNSQUEEZE = "Unsqueeze"
WHERE = "Where"

TYPE_ATTRIBUTES = ("dtype", "output_dtype", "softmax_precision", "stash_type", "to")  # they hold an element type
REDUCTION_AXES_INPUT_SINCE = {REDUCE_SUM: 13, REDUCE_MAX: 18, REDUCE_MEAN: 18}  # since this opset
