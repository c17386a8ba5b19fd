"""Tests of snpc.cli.commands."""
