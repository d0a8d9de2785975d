"""Images in files: opening, listing and writing them."""
