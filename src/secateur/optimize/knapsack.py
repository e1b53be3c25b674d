"""The multiple-choice knapsack: one option per block, greatest value within a capacity, by dynamic programming."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]


@dataclass(frozen=True)
class Frontier:
    """The best value for every capacity at once.

    Attributes:
        values: greatest value with a cost of at most c, shape (capacity + 1,); -inf where nothing fits.
        taken: for each block the option on the best path at each capacity, and whether it is the path's first of all.
        steps: costs of each block's options.
    """

    values: Array
    taken: list[tuple[Integers, Flags]]
    steps: list[Integers]

    def choice(self, capacity: int) -> list[int]:
        """The options of the best path that costs at most `capacity`; `values[capacity]` must be finite."""
        found = [0] * len(self.taken)
        for index in range(len(self.taken) - 1, -1, -1):
            option, first = self.taken[index]
            found[index] = int(option[capacity])
            if first[capacity]:
                break  # every block before it takes option 0
            capacity -= int(self.steps[index][found[index]])
        return found


def solve(steps: Sequence[Integers], values: Sequence[Array], capacity: int, needed: int = 0) -> Frontier:
    """Choose one option per block.

    Args:
        steps: for each block the cost of each option, non-negative integers; option 0 costs nothing.
        values: for each block the value of each option; option 0 is worth nothing.
        capacity: greatest total cost.
        needed: if positive, at least one of the first `needed` blocks must take another option than 0.
    """
    # `best`: with a needed option taken; `none`: without, which is worth nothing at any capacity
    best: Array = np.full(capacity + 1, -np.inf) if needed else np.zeros(capacity + 1)
    none = np.zeros(capacity + 1)
    taken = []
    for index, (step, value) in enumerate(zip(steps, values, strict=True)):
        base = np.maximum(best, none) if index < needed else best
        starts = none > best if index < needed else np.zeros(capacity + 1, dtype=np.bool_)
        best, option, first = _add_block(best, base, starts, step, value)
        taken.append((option, first))
    return Frontier(best, taken, list(steps))


def _add_block(best: Array, base: Array, starts: Flags, step: Integers, value: Array) -> tuple[Array, Integers, Flags]:
    """One more block: `best` goes on with option 0, `base` with any other; `starts` marks bases that took none yet."""
    new = best.copy()
    option = np.zeros(len(best), dtype=np.int64)
    first = np.zeros(len(best), dtype=np.bool_)
    for index in range(1, len(step)):
        cost = int(step[index])
        rest = len(best) - cost
        if rest <= 0:
            break
        candidate = base[:rest] + value[index]
        better = candidate > new[cost:]
        new[cost:][better] = candidate[better]
        option[cost:][better] = index
        first[cost:][better] = starts[:rest][better]
    return new, option, first
