"""Closed-form compression: rotations and least-squares refits, and the weights they give."""
