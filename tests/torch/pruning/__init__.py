"""Tests of snpc.torch.pruning."""
