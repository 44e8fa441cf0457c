"""From folders and archives of images to packed sets, and the check of what is there; no torch."""
