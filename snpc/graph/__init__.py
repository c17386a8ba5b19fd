"""What snpc adds to onnx-ir: shapes, walks, subgraphs and costs of graphs."""
