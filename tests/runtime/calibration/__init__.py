"""Tests of snpc.runtime.calibration."""
