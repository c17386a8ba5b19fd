"""Tests of snpc.cli.progress."""
