"""All bytes that enter or leave rft, and the checks they pass before use."""
