"""Floor 5: runs over whole images that can be killed and carried on. Knows floors 0 to 4."""
