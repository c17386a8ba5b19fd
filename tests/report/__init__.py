"""Tests of snpc.json_report."""
