"""Grouping: units that go together, as groups of heads x width with their sites."""
