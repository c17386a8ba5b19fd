"""Tests of snpc.runtime.statistics."""
