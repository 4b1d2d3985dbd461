"""Data: from a file or the hub to token ids with labels, and to batches.

sources -> records -> prompts -> tokens (with split, cached) -> batches
"""
