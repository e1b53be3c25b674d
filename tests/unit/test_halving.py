"""Successive halving by fronts: rungs, promotions and the order within a front, by hand."""

from __future__ import annotations

import pytest

from secateur.errors import SecateurError
from secateur.optimize.halving import Halving, order


@pytest.mark.parametrize(
    ("most", "first", "reduction", "rungs"),
    [(5, 1, 3, (1, 3, 5)), (9, 1, 3, (1, 3, 9)), (1, 1, 3, (1,)), (8, 2, 2, (2, 4, 8)), (2, 1, 3, (1, 2))],
)
def test_rungs(most: int, first: int, reduction: int, rungs: tuple[int, ...]) -> None:
    assert Halving(most, first, reduction).rungs == rungs


def test_epochs_of_many() -> None:
    """20 begin with one epoch, 6 go on for two and 2 for two more."""
    assert Halving(5).epochs(20) == 20 + 2 * 6 + 2 * 2


def test_one_of_three_goes_on() -> None:
    """The second of the first three goes on, then the fourth, which is better; of nine the best three may."""
    halving = Halving(5)
    went = []
    for number, error in enumerate([0.5, 0.3, 0.4, 0.2, 0.6, 0.7]):
        halving.tell(number, 0, [error])
        went.append(halving.promoted())
    assert went == [None, None, (1, 1), (3, 1), None, None]
    for number, error in ((1, 0.25), (3, 0.15), (6, 0.9), (7, 0.9)):
        halving.tell(number, 1 if number < 6 else 0, [error])
    assert halving.promoted() is None  # two on the second rung, and eight on the first
    halving.tell(8, 0, [0.1])
    assert halving.promoted() == (8, 1)
    halving.tell(8, 1, [0.12])
    assert halving.promoted() == (8, 2)
    halving.tell(8, 2, [0.11])  # on the last rung: nothing to go on to
    assert halving.promoted() is None


def test_what_breaks_a_limit_goes_on_last() -> None:
    halving = Halving(3)
    for number, (error, violation) in enumerate([(0.1, 0.5), (0.4, 0.0), (0.2, 0.1)]):
        halving.tell(number, 0, [error], violation)
    assert halving.promoted() == (1, 1)


def test_an_epsilon_net_orders_a_front() -> None:
    """The least error, the farthest from it, then the one in the middle; what is dominated comes last."""
    points = [(0.5, 0.5), (0.0, 1.0), (1.0, 0.0), (0.1, 0.9), (1.0, 1.0)]
    assert order(points, [0.0] * 5) == [1, 2, 0, 3, 4]
    assert order([], []) == []
    assert order([(0.2, 3.0)] * 2, [0.0, 0.0]) == [0, 1]


@pytest.mark.parametrize("settings", [(0, 1, 3), (5, 0, 3), (5, 6, 3), (5, 1, 1)])
def test_bad_settings(settings: tuple[int, int, int]) -> None:
    with pytest.raises(SecateurError, match="Halving takes"):
        Halving(*settings)
