"""Asynchronous successive halving by fronts: which candidate is trained on, and for how long.

ASHA (Li et al., MLSys 2020, arXiv 1810.05934) with several objectives (MO-ASHA, Schmucker et al., arXiv 2106.12639):
candidates are ranked by fronts, and within a front by an epsilon-net, which spreads those that go first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from secateur.errors import SecateurError
from secateur.optimize.pareto import Array, constrained_ranks


@dataclass
class Halving:
    """Candidates, numbered in the order in which they come, on rungs of more and more epochs.

    Attributes:
        most: epochs of the last rung.
        first: epochs of the first rung.
        reduction: of so many candidates on a rung one goes on.
    """

    most: int
    first: int = 1
    reduction: int = 3
    _told: list[dict[int, tuple[tuple[float, ...], float]]] = field(default_factory=list, repr=False)
    _promoted: list[set[int]] = field(default_factory=list, repr=False)

    def __post_init__(self) -> None:
        if not 1 <= self.first <= self.most or self.reduction < 2:
            raise SecateurError("Halving takes 1 epoch or more, at most as many as in all, and a reduction from 2.")
        self._told = [{} for _ in self.rungs]
        self._promoted = [set() for _ in self.rungs]

    @property
    def rungs(self) -> tuple[int, ...]:
        """Epochs of each rung, all before included."""
        found, epochs = [], self.first
        while epochs < self.most:
            found.append(epochs)
            epochs *= self.reduction
        return (*found, self.most)

    def epochs(self, count: int) -> int:
        """Epochs of so many candidates, as many going on as may."""
        rungs = self.rungs
        steps = [after - before for before, after in zip((0, *rungs), rungs, strict=False)]
        return sum(step * (count // self.reduction**rung) for rung, step in enumerate(steps))

    def promoted(self) -> tuple[int, int] | None:
        """A candidate and the rung that it goes on to, the highest first; None if none has earned it yet."""
        for rung in reversed(range(len(self.rungs) - 1)):
            told = self._told[rung]
            numbers = list(told)
            best = [numbers[i] for i in order([told[n][0] for n in numbers], [told[n][1] for n in numbers])]
            for number in best[: len(best) // self.reduction]:
                if number not in self._promoted[rung]:
                    self._promoted[rung].add(number)
                    return number, rung + 1
        return None

    def tell(self, number: int, rung: int, objectives: Sequence[float], violation: float = 0.0) -> None:
        """What a candidate has after a rung's epochs, of which less is better, and by how much it breaks limits."""
        self._told[rung][number] = (tuple(objectives), violation)


def order(points: Sequence[Sequence[float]] | Array, violations: Sequence[float]) -> list[int]:
    """Places of points from the best to the worst: by fronts, within each by an epsilon-net.

    Args:
        points: (points, objectives), less is better.
        violations: by how much each breaks its limits; what breaks none comes first.
    """
    if not len(points):
        return []
    values = np.asarray(points, dtype=np.float64)
    rank = constrained_ranks(values, violations)
    span = np.ptp(values, axis=0)
    scaled = (values - values.min(axis=0)) / np.where(span > 0, span, 1.0)
    found: list[int] = []
    for place in range(int(rank.max()) + 1):
        members = np.flatnonzero(rank == place)
        found += [int(members[i]) for i in _net(scaled[members])]
    return found


def _net(points: Array) -> list[int]:
    """The point with the least first objective, then always the one farthest from those that were taken."""
    taken = [int(points[:, 0].argmin())]
    distance = np.linalg.norm(points - points[taken[0]], axis=1)
    while len(taken) < len(points):
        distance[taken] = -1.0
        taken.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[taken[-1]], axis=1))
    return taken
