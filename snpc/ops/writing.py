"""Names of the operators that snpc itself writes into a graph: standard, and in every opset since 9."""

from snpc.ops.attention import MICROSOFT as MICROSOFT

ADD = "Add"
CLIP = "Clip"
CONCAT = "Concat"
DIV = "Div"
EXPAND = "Expand"
GATHER = "Gather"
IDENTITY = "Identity"
MATMUL = "MatMul"
MUL = "Mul"
MULTIHEAD = "MultiHeadAttention"  # com.microsoft
RESHAPE = "Reshape"
SHAPE = "Shape"
SLICE = "Slice"
SOFTMAX = "Softmax"
SPLIT = "Split"
SQUEEZE = "Squeeze"
SUB = "Sub"
TRANSPOSE = "Transpose"
WHERE = "Where"
