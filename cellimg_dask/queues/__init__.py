"""Floor 3, upper landing: where block functions run. Knows floors 0 to 2 and `loading`."""
