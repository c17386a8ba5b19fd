"""Tests of snpc.runtime.io."""
