"""A study's adapter as a folder that is used without the study."""
