"""What works on the graph: canonicalization, label propagation, grouping, weight edits, slicing, fusion."""
