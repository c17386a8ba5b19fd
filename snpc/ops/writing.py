"""Names of the operators that snpc itself writes into a graph: standard, and in every opset since 9."""

CONCAT = "Concat"
DIV = "Div"
GATHER = "Gather"
MUL = "Mul"
SPLIT = "Split"
SQUEEZE = "Squeeze"
WHERE = "Where"
