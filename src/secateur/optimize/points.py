"""Sub-networks that a search evaluated: what each costs, which are on the front, which is best under limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from secateur.errors import SecateurError
from secateur.optimize.pareto import nondominated
from secateur.subnetwork import SubNetwork

ERROR = "error"
OBJECTIVES = (ERROR, "macs", "params", "encoder_params", "size", "latency", "memory")
"""What a search can lessen: 1 - metric, and what a budget can limit of a sub-network."""
DEAR = frozenset({"latency", "memory"})
"""Those that are counted only where they are asked for."""


@dataclass(frozen=True)
class Point:
    """A sub-network that was evaluated.

    Attributes:
        number: its place in the order of evaluations, from 0.
        sub: its units, in the super-network.
        error: 1 - metric on the rows that the search judges by.
        costs: by kind of budget: multiply-adds, parameters, bytes, predicted milliseconds.
        seconds: of all evaluations up to this one.
    """

    number: int
    sub: SubNetwork
    error: float
    costs: Mapping[str, float]
    seconds: float = 0.0

    def of(self, objective: str) -> float:
        """The value of an objective, of which less is better."""
        return self.error if objective == ERROR else self.costs[objective]

    def beyond(self, limits: Mapping[str, float]) -> float:
        """By how large a share the costs exceed limits, at the worst; 0 if they keep all."""
        return max((self.costs[kind] / limit - 1 for kind, limit in limits.items()), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """JSON form."""
        return {**vars(self), "sub": self.sub.to_dict(), "costs": dict(self.costs)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Point:
        """Inverse of `to_dict`.

        Raises:
            SecateurError: a key is missing or a value is of another kind.
        """
        try:
            costs = {str(kind): float(cost) for kind, cost in data["costs"].items()}
            number, error, seconds = int(data["number"]), float(data["error"]), float(data["seconds"])
            return cls(number, SubNetwork.from_dict(data["sub"]), error, costs, seconds)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise SecateurError(f"A point of the front cannot be read: {type(error).__name__} {error}.") from None


def check_objectives(objectives: Sequence[str]) -> tuple[str, ...]:
    """Two or more different objectives, the error among them.

    Raises:
        SecateurError: names what is wrong.
    """
    known = ", ".join(OBJECTIVES)
    if unknown := [name for name in objectives if name not in OBJECTIVES]:
        raise SecateurError(f"There is no objective '{unknown[0]}': a search lessens two or more of {known}.")
    if len(set(objectives)) != len(objectives) or len(objectives) < 2 or ERROR not in objectives:
        raise SecateurError(f"A search lessens 'error' and one or more other objectives, each named once, of {known}.")
    return tuple(objectives)


def front_of(points: Sequence[Point], objectives: Sequence[str]) -> list[Point]:
    """The points that no other one dominates, by rising cost; of equal ones the first."""
    on = nondominated([[point.of(name) for name in objectives] for point in points])
    found: dict[tuple[float, ...], Point] = {}
    for point, there in zip(points, on, strict=True):
        if there:
            found.setdefault(tuple(point.of(name) for name in objectives), point)
    others = [name for name in objectives if name != ERROR]
    return sorted(found.values(), key=lambda point: [point.of(name) for name in (*others, ERROR)])


def best_of(points: Sequence[Point], limits: Mapping[str, float]) -> Point | None:
    """The point with the least error among those that keep all limits, of equal ones the cheapest; None if none does.

    Args:
        points: what was evaluated.
        limits: by kind of budget.
    """
    kept = [point for point in points if point.beyond(limits) <= 0]
    return min(kept, key=lambda point: (point.error, *(point.costs[kind] for kind in limits)), default=None)
