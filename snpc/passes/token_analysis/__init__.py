"""Token analysis: follows the token axis through the graph and finds where tokens can be reduced."""
