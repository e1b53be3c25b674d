"""Costs of a sub-network (cheap: a search asks thousands of times) and timers of a model (honest: they verify)."""
