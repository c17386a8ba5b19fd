"""Label propagation: which units of which constants every channel of a tensor comes from."""
