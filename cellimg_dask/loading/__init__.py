"""Floor 3: reading inputs and loading cells, the one path. Knows floors 0 to 2."""
