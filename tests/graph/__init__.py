"""Tests of snpc.graph."""
