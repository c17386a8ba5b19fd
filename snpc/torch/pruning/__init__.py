"""Pruning with gradients: gates, learned masks, schedules of rounds."""
