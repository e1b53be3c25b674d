"""Samplers find a front that is known, reach every bound, and go on the same when they are told the same."""

from __future__ import annotations

import random
from typing import get_args

import pytest

from secateur.errors import SecateurError
from secateur.optimize.pareto import hypervolume
from secateur.optimize.samplers import Name, sampler
from secateur.optimize.spaces import Space, Values

SPACE = Space("small", (4,) * 6, (48,) * 6, 8)
NAMES: tuple[Name, ...] = get_args(Name)


def objectives(values: Values) -> tuple[float, float]:
    """A size, and an error that falls with layers much more than with heads and neurons."""
    layers, heads, steps = values
    size = layers * (heads / 4 + steps / 6) / 12
    return 1 - 0.7 * layers / 6 - 0.2 * (layers > 0) * heads / 4 - 0.1 * (layers > 0) * steps / 6, size


def search(name: Name, seed: int, count: int) -> list[Values]:
    """The vectors that a search asks for."""
    asks = []
    one = sampler(name, SPACE, 2, seed=seed)
    for _ in range(count):
        values = one.ask()
        one.tell(values, objectives(values))
        asks.append(values)
    return asks


@pytest.mark.parametrize("name", NAMES)
def test_the_first_points_then_within_bounds(name: Name) -> None:
    count = 14 if name == "gp" else 25  # its fits take a second each
    asks = search(name, 0, count)
    assert asks[:3] == [(6, 4, 6), (0, 1, 1), (3, 2, 3)]
    for values in asks:
        SPACE.decode(values)
    assert len(set(asks)) > count // 2
    assert search(name, 0, count) == asks
    assert search(name, 1, count) != asks


def test_search_beats_chance_on_average() -> None:
    """Mean hypervolume of five seeds after 60 evaluations, of at most 4."""
    found = {}
    for name in ("random", "local", "evolution", "nsga2"):
        volumes = [
            hypervolume([objectives(values) for values in search(name, seed, 60)], (2, 2))  # type: ignore[arg-type]
            for seed in range(5)
        ]
        found[name] = sum(volumes) / len(volumes)
    best = hypervolume([objectives((a, b, c)) for a in range(7) for b in range(1, 5) for c in range(1, 7)], (2, 2))
    assert found["random"] < best
    assert found["local"] >= found["random"]
    assert all(volume > 0.97 * best for volume in found.values())


def test_a_draw_of_ones_own_is_used() -> None:
    one = sampler("random", SPACE, 2, draw=lambda source: (2, 2, source.randint(1, 2)))
    for _ in range(3):
        one.tell(one.ask(), (0.0, 0.0))
    assert {one.ask()[:2] for _ in range(4)} == {(2, 2)}


def test_large_spaces_are_searched_without_a_model() -> None:
    large = Space("large", (4,) * 30, (48,) * 30)
    with pytest.raises(SecateurError, match=r"1,560 variables of the space 'large': take 'random', 'local'"):
        sampler("gp", large, 2)
    one, draw = sampler("evolution", large, 2, seed=3), random.Random(0)
    for _ in range(14):
        values = one.ask()
        large.decode(values)
        one.tell(values, (draw.random(), draw.random()))


def test_unknown_names_are_refused() -> None:
    with pytest.raises(SecateurError, match="random, local, evolution, nsga2, tpe, gp, not 'grid'"):
        sampler("grid", SPACE, 2)  # type: ignore[arg-type]
    one = sampler("tpe", SPACE, 2)
    with pytest.raises(SecateurError, match="asked before it is told"):
        one.tell((1, 1, 1), (0.0, 0.0))
