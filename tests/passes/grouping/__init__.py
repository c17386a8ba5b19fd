"""Tests of snpc.passes.grouping."""
