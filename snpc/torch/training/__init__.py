"""Training of graphs in torch: loop, losses, data order, checkpoints, several processes."""
