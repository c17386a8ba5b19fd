"""Tests of snpc.torch."""
