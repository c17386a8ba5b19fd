"""Tests of snpc.ops."""
