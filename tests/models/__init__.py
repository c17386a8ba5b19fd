"""The models that tests run on, and what writes them."""
