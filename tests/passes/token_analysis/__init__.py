"""Tests of snpc.passes.token_analysis."""
