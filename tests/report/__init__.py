"""Tests of snpc.report."""
