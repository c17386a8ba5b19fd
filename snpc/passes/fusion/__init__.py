"""Fusions that a runtime rewards: attention and biases in one node."""
