"""All bytes that enter or leave rft, and what is checked of them before they are used."""
