"""Tests of snpc.criteria."""
