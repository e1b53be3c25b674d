"""Points of a search: fronts by several objectives, the best under limits, and what is read back."""

from __future__ import annotations

import pytest

from secateur.errors import SecateurError
from secateur.optimize.pareto import constrained_ranks
from secateur.optimize.points import Point, best_of, check_objectives, front_of
from secateur.optimize.samplers import sampler
from secateur.optimize.spaces import Space
from secateur.subnetwork import SubNetwork


def point(number: int, error: float, params: float, latency: float = 1.0) -> Point:
    """A point of one layer with one head and `number` neurons."""
    sub = SubNetwork(((True,),), ((True,) * number + (False,) * (9 - number),))
    return Point(number, sub, error, {"params": params, "latency": latency}, seconds=0.5 * number)


POINTS = [
    point(0, 0.1, 100, 9),
    point(1, 0.2, 50, 5),
    point(2, 0.25, 60, 4),
    point(3, 0.2, 50, 5),
    point(4, 0.3, 20, 6),
]


def test_fronts_by_hand() -> None:
    two = front_of(POINTS, ("error", "params"))
    assert [found.number for found in two] == [4, 1, 0]  # by rising cost; 2 is dominated, 3 equals 1
    three = front_of(POINTS, ("error", "params", "latency"))
    assert [found.number for found in three] == [4, 1, 2, 0]


@pytest.mark.parametrize(
    ("limits", "number"),
    [({}, 0), ({"params": 99}, 1), ({"params": 99, "latency": 4.5}, 2), ({"params": 20}, 4), ({"params": 19}, None)],
)
def test_the_best_under_limits(limits: dict[str, float], number: int | None) -> None:
    best = best_of(POINTS, limits)
    assert (best.number if best else None) == number


def test_how_far_beyond_limits() -> None:
    assert POINTS[0].beyond({"params": 80, "latency": 3}) == pytest.approx(2.0)
    assert POINTS[0].beyond({"params": 200}) == pytest.approx(-0.5)
    assert POINTS[0].beyond({}) == 0.0


def test_ranks_under_limits() -> None:
    """Points that keep the limits come first by fronts; of the others the one that breaks them least."""
    values = [(0.1, 9.0), (0.5, 0.5), (0.2, 1.0), (0.6, 0.6), (0.9, 0.9)]
    assert constrained_ranks(values, [0.7, 0.0, -0.1, 0.0, 0.2]).tolist() == [3, 0, 0, 1, 2]
    assert constrained_ranks(values, [2, 1, 1, 3, 4]).tolist() == [1, 0, 0, 2, 3]


@pytest.mark.parametrize("name", ["local", "evolution", "nsga2", "tpe"])
def test_searches_stay_within_limits(name: str) -> None:
    """Of 60 candidates more keep a limit that one in three of all points keeps than chance would find."""
    space = Space("small", (4,) * 6, (48,) * 6, 8)
    asked = sampler(name, space, 2, seed=0, limited=True)  # type: ignore[arg-type]
    kept = 0
    for _ in range(60):
        layers, heads, steps = values = asked.ask()
        size = layers * (heads / 4 + steps / 6) / 12
        asked.tell(values, (1 - size, size), max(0.0, size / 0.3 - 1))
        kept += size <= 0.3
    assert kept >= 40  # a third of the space, and half of what is drawn evenly over sizes


def test_a_point_is_read_back() -> None:
    assert Point.from_dict(POINTS[2].to_dict()) == POINTS[2]
    with pytest.raises(SecateurError, match="cannot be read: KeyError 'error'"):
        Point.from_dict({"number": 1, "sub": POINTS[0].sub.to_dict(), "costs": {}, "seconds": 0.0})


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        (("error", "speed"), "no objective 'speed': a search lessens two or more of error, macs"),
        (("error",), "'error' and one or more other"),
        (("params", "macs"), "'error' and one or more other"),
        (("error", "macs", "macs"), "each named once"),
    ],
)
def test_bad_objectives(objectives: tuple[str, ...], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        check_objectives(objectives)
