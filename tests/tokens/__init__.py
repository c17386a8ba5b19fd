"""Tests of snpc.tokens."""
