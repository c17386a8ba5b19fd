"""Tests of snpc.targets."""
