"""Tests of snpc.runtime."""
