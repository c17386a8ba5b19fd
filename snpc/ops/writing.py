"""Names of the operators that snpc itself writes into a graph: standard, and in every opset since 9."""

from snpc.ops.attention import MICROSOFT as MICROSOFT

ADD = "Add"
CAST = "Cast"
CLIP = "Clip"
CONCAT = "Concat"
DIV = "Div"
EINSUM = "Einsum"
EXP = "Exp"
EXPAND = "Expand"
GATHER = "Gather"
IDENTITY = "Identity"
MATMUL = "MatMul"
MUL = "Mul"
MULTIHEAD = "MultiHeadAttention"  # com.microsoft
REDUCE_MAX = "ReduceMax"
REDUCE_SUM = "ReduceSum"
RESHAPE = "Reshape"
SHAPE = "Shape"
SLICE = "Slice"
SOFTMAX = "Softmax"
SPLIT = "Split"
SQUEEZE = "Squeeze"
SUB = "Sub"
TRANSPOSE = "Transpose"
WHERE = "Where"

TYPE_ATTRIBUTES = ("dtype", "output_dtype", "softmax_precision", "stash_type", "to")  # they hold an element type
REDUCTION_AXES_ARE_AN_INPUT = {REDUCE_SUM: 13, REDUCE_MAX: 18}  # since this opset
