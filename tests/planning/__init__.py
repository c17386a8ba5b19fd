"""Tests of snpc.planning."""
