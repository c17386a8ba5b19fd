"""Tests of snpc.passes.propagation."""
