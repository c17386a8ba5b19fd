"""Canonicalization: rewrites without change of meaning that the analysis relies on."""
