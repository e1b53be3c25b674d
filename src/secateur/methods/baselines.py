"""Baselines for honest tables: random, weight-magnitude and local-output scores under the same search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from secateur.prune import prune
from secateur.run import STRUCTURED_BUDGETS, Job, Outcome
from secateur.scores.baselines import local_scores, magnitude_scores, random_scores
from secateur.subnetwork import UnitScores


@dataclass
class Baseline:
    """A structured pruning whose scores look at no trajectory and no loss.

    Attributes:
        score: "random" (seeded), "magnitude" (norm of a unit's weights) or "local" (norm of what it adds to its layer's
            output, from unlabelled data).
        batches, batch_size: calibration data of the local score.
        multiple: neurons per layer are kept in multiples of this many.
        head_rate: factor on head scores, which sets how many neurons a head is worth.
    """

    score: Literal["random", "magnitude", "local"] = "magnitude"
    batches: int = 4
    batch_size: int = 32
    multiple: int = 64
    head_rate: float = 1.0

    name: ClassVar[str] = "baseline"
    budgets: ClassVar[frozenset[str]] = STRUCTURED_BUDGETS

    def run(self, job: Job) -> Outcome:
        """Score, search, slice."""
        scores = self._scores(job)
        return prune(job, scores, multiple=self.multiple, head_rate=self.head_rate)

    def _scores(self, job: Job) -> UnitScores:
        if self.score == "random":
            return random_scores(job.model, job.seed)
        if self.score == "magnitude":
            return magnitude_scores(job.model)
        return local_scores(job.model, job.calibration(self.batches, self.batch_size), progress=job.show)
