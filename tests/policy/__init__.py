"""Rules that hold for all of snpc: structure, documents, refusals, and no damage by damaged models."""
