"""Rewrites that remove units: sliced weights, recomputed shape parameters, and the masked oracle."""
