"""Makes tables, pictures and one page from run folders. Reads files only; no torch."""
