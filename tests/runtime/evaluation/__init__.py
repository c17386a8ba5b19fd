"""Tests of snpc.runtime.evaluation."""
