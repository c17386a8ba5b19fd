"""Tests of snpc.passes.slicing."""
