"""From run folders to a table, three pictures and one page. Reads files only; no torch."""
