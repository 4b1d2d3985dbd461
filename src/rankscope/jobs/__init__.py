"""Kinds of job, and where they run: local processes or a Ray cluster."""
