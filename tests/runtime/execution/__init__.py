"""Tests of snpc.runtime.execution."""
