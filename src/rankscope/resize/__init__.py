"""Smaller adapters by truncated SVD."""
