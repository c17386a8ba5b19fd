"""Label propagation: which positions of which constants each position of a tensor depends on."""
