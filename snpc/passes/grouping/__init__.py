"""Grouping: from labels to units, and from units to groups of heads x width with their sites."""
