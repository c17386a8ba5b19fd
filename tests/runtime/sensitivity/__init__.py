"""Tests of snpc.runtime.sensitivity."""
