"""Floor 1: errors, blocks, block functions, and the plan of a cell. Knows geometry."""
