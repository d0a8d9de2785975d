"""Floor 5: images in files and stores, opened and written."""
