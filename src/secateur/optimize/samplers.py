"""Who proposes the next point of a space: `ask` gives a vector, `tell` its objectives, of which less is better.

Each begins with the full network, the lower bounds and the midpoint. What is asked depends on the seed and on what was
told so far alone: a search that is asked and told the same again goes on as it would have. A point that breaks a limit
is told with its violation; points that break none come before all others (Deb, 2000).
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal, Protocol, get_args

from secateur.errors import SecateurError
from secateur.optimize.pareto import constrained_ranks
from secateur.optimize.spaces import Space, Values

if TYPE_CHECKING:
    import optuna

Name = Literal["random", "local", "evolution", "nsga2", "tpe", "gp"]
MODELS = ("nsga2", "tpe", "gp")
MOST = 1000  # variables that a model of the objectives is asked about


class Sampler(Protocol):
    """Asked for vectors and told their objectives, in the order in which they were asked for."""

    def ask(self) -> Values:
        """The next vector to evaluate; several may be asked for before the first one is told."""
        ...

    def tell(self, values: Values, objectives: Sequence[float], violation: float = 0.0) -> None:
        """What the next vector that was asked for has, and by how much it breaks its limits."""
        ...


def sampler(
    name: Name,
    space: Space,
    objectives: int,
    *,
    seed: int = 0,
    draw: Callable[[random.Random], Values] | None = None,
    limited: bool = False,
) -> Sampler:
    """A sampler by name.

    Args:
        name: "random"; "local", which changes one entry of a point of the front; "evolution", regularised and ranked by
            fronts (MO-REA); or Optuna's "nsga2", "tpe" and "gp" (a Gaussian process with expected hypervolume
            improvement).
        space: what is searched.
        objectives: how many there are.
        seed: of every choice.
        draw: a random vector, for the first three; `space.sample` if None.
        limited: whether a point may break limits.

    Raises:
        SecateurError: an unknown name, or a space with too many variables for Optuna.
    """
    if name not in get_args(Name):
        raise SecateurError(f"A search goes by {', '.join(get_args(Name))}, not {name!r}.")
    if name in MODELS:
        if len(space.variables) > MOST:
            raise SecateurError(
                f"'{name}' models each of the {len(space.variables):,} variables of the space '{space.kind}': take "
                "'random', 'local' or 'evolution'."
            )
        return _Optuna(name, space, objectives, seed, limited)
    own = {"random": _Random, "local": _Local, "evolution": _Evolution}[name]
    return own(space, seed, draw or space.sample)


class _Random:
    """Draws, after the first points."""

    def __init__(self, space: Space, seed: int, draw: Callable[[random.Random], Values]) -> None:
        self.space = space
        self.source = random.Random(seed)
        self.draw = draw
        self.first = _first(space)
        self.asked = 0
        self.points: list[Values] = []
        self.objectives: list[tuple[float, ...]] = []
        self.violations: list[float] = []

    def ask(self) -> Values:
        self.asked += 1
        return self.first[self.asked - 1] if self.asked <= len(self.first) else self.next()

    def tell(self, values: Values, objectives: Sequence[float], violation: float = 0.0) -> None:
        self.points.append(values)
        self.objectives.append(tuple(objectives))
        self.violations.append(violation)

    def next(self) -> Values:
        """The next vector, once the first ones are known."""
        return self.draw(self.source)


class _Local(_Random):
    """One entry of a point of the front is changed; one random vector comes before."""

    def next(self) -> Values:
        if self.asked == len(self.first) + 1 or not self.points:
            return self.draw(self.source)
        rank = constrained_ranks(self.objectives, self.violations)
        front = [values for values, place in zip(self.points, rank, strict=True) if place == 0]
        return self.space.mutated(self.source.choice(front), self.source)


class _Evolution(_Random):
    """MO-REA: of five drawn from the last ten the one on the best front is changed in one entry."""

    population = 10
    tournament = 5

    def next(self) -> Values:
        if self.asked <= self.population or not self.points:
            return self.draw(self.source)
        alive = slice(-self.population, None)
        rank = constrained_ranks(self.objectives[alive], self.violations[alive])
        parent = min(self.source.choices(range(len(rank)), k=self.tournament), key=lambda i: rank[i])
        return self.space.mutated(self.points[alive][parent], self.source)


class _Optuna:
    """One of Optuna's samplers."""

    def __init__(self, name: str, space: Space, objectives: int, seed: int, limited: bool) -> None:
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        kinds = {
            "nsga2": lambda: optuna.samplers.NSGAIISampler(population_size=10, seed=seed),
            "tpe": lambda: optuna.samplers.TPESampler(seed=seed),
            "gp": lambda: optuna.samplers.GPSampler(seed=seed, deterministic_objective=True),
        }
        self.space, self.limited = space, limited
        self.study = optuna.create_study(directions=["minimize"] * objectives, sampler=kinds[name]())
        self.ranges = {v.name: optuna.distributions.IntDistribution(v.low, v.high) for v in space.variables}
        for values in _first(space):
            self.study.enqueue_trial(dict(zip(self.ranges, values, strict=True)))
        self.trials: deque[optuna.Trial] = deque()

    def ask(self) -> Values:
        self.trials.append(self.study.ask(self.ranges))  # type: ignore[arg-type]
        return tuple(int(self.trials[-1].params[name]) for name in self.ranges)

    def tell(self, values: Values, objectives: Sequence[float], violation: float = 0.0) -> None:
        if not self.trials:
            raise SecateurError("A sampler is asked before it is told.")
        trial = self.trials.popleft()
        if self.limited:  # of all trials or of none: one without would count as broken
            trial.set_constraint("limits", violation)
        self.study.tell(trial, list(objectives))


def _first(space: Space) -> list[Values]:
    """The full network, all lower bounds, the midpoint."""
    return [space.highest, tuple(v.low for v in space.variables), space.midpoint]
