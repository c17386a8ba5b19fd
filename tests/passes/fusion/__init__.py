"""Tests of snpc.passes.fusion."""
