"""The version of snpc: pyproject.toml reads it here, and so does whatever writes it into a file."""

__version__ = "0.1.0"
