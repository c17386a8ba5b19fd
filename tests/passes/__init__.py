"""Tests of snpc.passes."""
