"""Tests of snpc.passes.canonicalization."""
