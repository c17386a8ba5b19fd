"""Tests of snpc.report.charts."""
