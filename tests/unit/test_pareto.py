"""Fronts worked out by hand (spec 13.8 and 13.12)."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from secateur.errors import SecateurError
from secateur.optimize.pareto import hypervolume, knee, nondominated, quantiles, ranks


@pytest.mark.parametrize(
    ("points", "volume"),
    [
        ([(0, 0)], 4.0),
        ([(1, 1)], 1.0),
        ([(0, 1), (1, 0)], 3.0),
        ([(0.5, 0.5)], 2.25),
        ([(0.2, 0.8), (0.8, 0.2), (0.9, 0.9)], 2.88),
        ([(2, 0), (0, 3)], 0.0),
        ([(0, 1), (0, 1), (0, 1.5), (1, 0)], 3.0),
    ],
)
def test_hypervolume_of_two_objectives(points: list[tuple[float, float]], volume: float) -> None:
    assert hypervolume(points, (2, 2)) == pytest.approx(volume, abs=1e-12)
    assert hypervolume(points[::-1], (2, 2)) == pytest.approx(volume, abs=1e-12)


def test_hypervolume_of_three_objectives_is_a_union_of_boxes() -> None:
    # boxes 1x1x2 and 2x1x1 share 1x1x1; a third one, 1x2x1, shares that cube with both
    assert hypervolume([(1, 1, 0), (0, 1, 1)], (2, 2, 2)) == pytest.approx(3.0)
    assert hypervolume([(1, 1, 0), (0, 1, 1), (1, 0, 1)], (2, 2, 2)) == pytest.approx(4.0)
    generator = np.random.default_rng(0)
    points = generator.random((12, 3))
    grid = generator.random((200_000, 3))
    share = (points[None] <= grid[:, None]).all(axis=2).any(axis=1).mean()
    assert hypervolume(points, (1, 1, 1)) == pytest.approx(share, abs=5e-3)


def test_points_only_add_volume() -> None:
    generator = np.random.default_rng(1)
    points = generator.random((30, 2))
    grown = [hypervolume(points[: i + 1], (2, 2)) for i in range(30)]
    assert all(later >= earlier for earlier, later in itertools.pairwise(grown))


def test_nondominated_is_what_brute_force_finds() -> None:
    generator = np.random.default_rng(2)
    for _ in range(20):
        points = generator.integers(0, 5, (25, 2)).astype(float)  # with many ties
        slow = [not any((q <= p).all() and (q < p).any() for q in points) for p in points]
        assert nondominated(points).tolist() == slow
    assert nondominated([(0, 0), (0, 0), (0, 1)]).tolist() == [True, True, False]


def test_ranks_peel_one_front_after_the_other() -> None:
    assert ranks([(0, 3), (3, 0), (1, 3), (3, 3), (1, 3)]).tolist() == [0, 0, 1, 2, 1]


def test_quantiles_count_ties_half() -> None:
    assert quantiles([1, 2, 5], [1, 2, 2, 4]).tolist() == [0.125, 0.5, 1.0]


def test_the_knee_is_the_bend() -> None:
    assert knee([(0, 10), (1, 2), (5, 1), (10, 0)]) == 1
    assert knee([(0, 10), (1, 2), (5, 1), (10, 0), (1000, 9)]) == 1  # what is dominated sets no scale
    assert knee([(0, 1)]) == 0


def test_what_is_no_front_is_refused() -> None:
    with pytest.raises(SecateurError, match="finite objectives only"):
        nondominated([(0, float("nan"))])
    with pytest.raises(SecateurError, match="at least one point"):
        hypervolume([], (1, 1))
    with pytest.raises(SecateurError, match="2 objectives, the reference 3"):
        hypervolume([(0, 0)], (1, 1, 1))
