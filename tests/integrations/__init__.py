"""Tests of snpc.integrations."""
