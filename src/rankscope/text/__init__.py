"""Words and numbers in English and Korean."""
