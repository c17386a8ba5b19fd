"""Token analysis: where the token axis goes, and where tokens can get fewer."""
