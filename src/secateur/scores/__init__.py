"""Importance of heads and neurons: trajectory scores (exact, probes), Fisher information, baselines."""

from __future__ import annotations

from secateur.scores.baselines import local_scores, magnitude_scores, random_scores
from secateur.scores.exact import exact_scores
from secateur.scores.fisher import fisher_scores
from secateur.scores.probes import probe_scores
from secateur.scores.trajectory import (
    TrajectoryScores,
    UnitGradients,
    combine,
    combine_gradients,
    near_cut,
    refined,
)

__all__ = [
    "TrajectoryScores",
    "UnitGradients",
    "combine",
    "combine_gradients",
    "exact_scores",
    "fisher_scores",
    "local_scores",
    "magnitude_scores",
    "near_cut",
    "probe_scores",
    "random_scores",
    "refined",
]
