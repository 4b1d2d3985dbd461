"""A study's directory."""
