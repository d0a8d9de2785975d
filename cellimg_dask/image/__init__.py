"""Floor 4: lazy images, how they are defined, and how dask sees them. Knows floors 0 to 3."""
