"""Sensitivity analysis: how much the outputs change as each group gets narrower."""
