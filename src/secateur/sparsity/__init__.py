"""Weights that are zero: the prior that draws them there, the schedule, what is chosen, and how zeros are stored."""
