"""Tests of snpc.runtime.closed_form."""
