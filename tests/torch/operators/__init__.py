"""Tests of snpc.torch.operators."""
