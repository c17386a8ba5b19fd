"""Measuring written models: latency, equality of outputs, accuracy."""
