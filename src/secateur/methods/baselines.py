"""Baselines for honest tables: random, weight-magnitude and local-output scores under the same search."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from secateur.checks import check_fields
from secateur.costs.analytic import LinearCost, params
from secateur.prune import prune
from secateur.run import STRUCTURED_BUDGETS, USUAL_BUDGET, Job, Outcome
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
        head_rate: factor on head scores, which sets how many neurons a head is worth; None takes the one at which both
            kinds have the same score per parameter, since chance and norms have no common scale of their own.
    """

    score: Literal["random", "magnitude", "local"] = "magnitude"
    batches: int = 4
    batch_size: int = 32
    multiple: int = 64
    head_rate: float | None = None

    name: ClassVar[str] = "baseline"
    budgets: ClassVar[frozenset[str]] = STRUCTURED_BUDGETS
    usual_budget: ClassVar[str] = USUAL_BUDGET
    cuts_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, job: Job) -> Outcome:
        """Score, search, slice."""
        scores = self._scores(job)
        rate = balanced_rate(scores, params(job.model)) if self.head_rate is None else self.head_rate
        return prune(job, scores, multiple=self.multiple, head_rate=rate)

    def _scores(self, job: Job) -> UnitScores:
        if self.score == "random":
            return random_scores(job.model, job.seed)
        if self.score == "magnitude":
            return magnitude_scores(job.model)
        return local_scores(job.model, job.calibration(self.batches, self.batch_size), progress=job.show)


def balanced_rate(scores: UnitScores, cost: LinearCost) -> float:
    """The factor on head scores at which heads and neurons have the same total score per total cost."""

    def score_per_cost(values: list[Tensor], costs: tuple[float, ...]) -> float:
        total = sum(c * len(v) for v, c in zip(values, costs, strict=True))
        return sum(float(v.sum()) for v in values) / max(total, 1.0)

    heads = score_per_cost(scores.heads, cost.heads)
    return score_per_cost(scores.neurons, cost.neurons) / heads if heads > 0 else 1.0
