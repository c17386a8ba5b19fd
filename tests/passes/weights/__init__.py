"""Tests of snpc.passes.weights."""
