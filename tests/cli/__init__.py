"""Tests of snpc.cli."""
