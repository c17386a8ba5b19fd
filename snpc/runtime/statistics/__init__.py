"""Statistics of activations, collected inside onnxruntime over calibration data."""
