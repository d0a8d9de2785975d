"""Floor 5: objects across cells: stacks, points, labels, tables, reductions, pyramids."""
