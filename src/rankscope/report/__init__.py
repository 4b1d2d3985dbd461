"""Reports of a study: an offline page, Markdown, tables and figures."""
