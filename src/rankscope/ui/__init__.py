"""The terminal and the live page."""
