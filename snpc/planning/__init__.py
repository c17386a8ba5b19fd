"""Planning: from scores and a budget to the widths of a plan. Nothing here runs a model."""
