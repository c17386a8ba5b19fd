"""The verbs of snpc, each a function of the value that the one before returned."""
