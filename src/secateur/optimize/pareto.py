"""Fronts of points of which less is better in every coordinate: who is on them, and how much they cover."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from secateur.errors import SecateurError

Array = npt.NDArray[np.float64]


def nondominated(points: Sequence[Sequence[float]] | Array) -> npt.NDArray[np.bool_]:
    """Which points no other one dominates: is as good everywhere and better somewhere. Equal points stay together.

    Args:
        points: (points, objectives), less is better.

    Raises:
        SecateurError: a value is not finite.
    """
    values = _checked(points)
    better = (values[:, None] <= values[None]).all(axis=2) & (values[:, None] < values[None]).any(axis=2)
    return np.asarray(~better.any(axis=0))


def ranks(points: Sequence[Sequence[float]] | Array) -> npt.NDArray[np.int64]:
    """Non-dominated sorting (Deb et al., 2002): 0 for the front, 1 for the front of what is left, and so on."""
    values = _checked(points)
    found = np.full(len(values), -1, dtype=np.int64)
    for rank in range(len(values)):
        left = np.flatnonzero(found < 0)
        if not len(left):
            break
        found[left[nondominated(values[left])]] = rank
    return found


def constrained_ranks(points: Sequence[Sequence[float]] | Array, violations: Sequence[float]) -> npt.NDArray[np.int64]:
    """Ranks under limits (Deb, 2000): points that break none by fronts, then the others, least broken first.

    Args:
        points: (points, objectives), less is better.
        violations: by how much each point breaks its limits; 0 or less if it keeps them.
    """
    values, broken = _checked(points), np.asarray(violations, dtype=np.float64)
    found = np.zeros(len(values), dtype=np.int64)
    kept = broken <= 0
    if kept.any():
        found[kept] = ranks(values[kept])
    steps = np.unique(broken[~kept])
    found[~kept] = np.searchsorted(steps, broken[~kept]) + (found[kept].max() + 1 if kept.any() else 0)
    return found


def hypervolume(points: Sequence[Sequence[float]] | Array, reference: Sequence[float]) -> float:
    """Volume that points dominate up to a reference, for any number of objectives.

    What is beyond the reference counts nothing. By slices along the first coordinate: exact, for fronts of hundreds of
    points and a few objectives.

    Args:
        points: (points, objectives), less is better.
        reference: a point that is worse than those of interest.

    Raises:
        SecateurError: a value is not finite, or the reference has another number of objectives.
    """
    values, limit = _checked(points), np.asarray(reference, dtype=np.float64)
    if values.shape[1] != len(limit):
        raise SecateurError(f"The points have {values.shape[1]} objectives, the reference {len(limit)}.")
    return _volume(values[(values < limit).all(axis=1)], limit)


def _volume(values: Array, limit: Array) -> float:
    if not len(values):
        return 0.0
    if len(limit) == 1:
        return float(limit[0] - values.min())
    values = values[nondominated(values)]
    values = values[np.argsort(values[:, 0], kind="stable")]
    ends = [*values[1:, 0], limit[0]]
    return sum(
        (end - point[0]) * _volume(values[: i + 1, 1:], limit[1:])
        for i, (point, end) in enumerate(zip(values, ends, strict=True))
        if end > point[0]
    )


def quantiles(values: Sequence[float] | Array, among: Sequence[float] | Array) -> Array:
    """Share of a set that is below each value, ties counted half, from 0 to 1: objectives on one scale.

    Args:
        values: what is transformed.
        among: all values that are compared, which define the transform.
    """
    those = np.sort(np.asarray(among, dtype=np.float64))
    below, upto = (np.searchsorted(those, values, side=side) for side in ("left", "right"))
    return np.asarray((below + upto) / (2 * max(len(those), 1)), dtype=np.float64)


def knee(points: Sequence[Sequence[float]] | Array) -> int:
    """Index of the point of a front that is farthest below the plane through its extremes, each objective from 0 to 1.

    With two objectives that is the bend of the curve. Of points that are equally far the first one.
    """
    values = _checked(points)
    front = np.flatnonzero(nondominated(values))
    there = values[front]
    span = np.ptp(there, axis=0)
    scaled = (there - there.min(axis=0)) / np.where(span > 0, span, 1.0)
    return int(front[np.argmin(scaled.sum(axis=1))])


def _checked(points: Sequence[Sequence[float]] | Array) -> Array:
    values = np.asarray(points, dtype=np.float64)
    if values.ndim != 2 or not len(values):
        raise SecateurError("A front needs at least one point, each with its objectives.")
    if not np.isfinite(values).all():
        raise SecateurError("A front has finite objectives only.")
    return values
