"""Weights around a group: who produces it, who consumes it, and edits of both."""
