"""Which units to keep: the best sub-network under a budget."""
