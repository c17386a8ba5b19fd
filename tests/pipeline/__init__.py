"""Tests of snpc.pipeline."""
