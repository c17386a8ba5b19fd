"""Model files: loading, checking, and writing them atomically."""
