"""The sub-network of greatest importance that meets a budget.

Importance is additive, so within a block the best units are always the highest scores, and a sub-network is one width
per block. What differs is how costs add up:

* Linear costs (MACs, parameters, bytes): Kwon et al., NeurIPS 2022, algorithm 1: for every number of heads k the k best
  heads, and as many of the best neurons as the rest of the budget pays for. Exact when all heads cost the same and all
  neurons cost the same, as in every architecture of the family table at one length; otherwise units are ranked by value
  per cost and what is left over is spent greedily.
* Latency tables, where a block's cost is a curve over its width: the width of each block is an option with a value and
  a cost, a multiple-choice knapsack, solved by dynamic programming over latency cut into fine ticks (costs are rounded
  up, so the limit holds; what rounding left over is spent greedily). This solves what the same paper approximates with
  a hinge fitted to each table and an enumeration of dropped blocks. Linear limits beside the latency enter as prices
  on their costs, the smallest under which they hold.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from secateur.costs.analytic import LinearCost
from secateur.costs.budget import Constraint, check_feasible
from secateur.errors import InvalidBudget, SecateurError
from secateur.families import UnitKind
from secateur.optimize.knapsack import Array, Flags, Frontier, Integers, solve
from secateur.subnetwork import SubNetwork, UnitScores

Choice = list[int]
"""For each block, which of its options is taken."""

TICKS = 16384
"""Steps that the latency of everything prunable is cut into."""


@dataclass(frozen=True)
class Options:
    """What one block may become.

    Attributes:
        kind: heads or neurons.
        index: of the block among its kind.
        widths: numbers of units on offer, from 0 to all, shape (options,).
        values: summed scores of that many best units, shape (options,).
        costs: without the fixed part, shape (constraints, options).
    """

    kind: UnitKind
    index: int
    widths: Integers
    values: Array
    costs: Array


def allocate(
    scores: UnitScores, constraints: Sequence[Constraint], *, multiple: int = 64, head_rate: float = 1.0
) -> SubNetwork:
    """Choose the units to keep. At least one head of the network is kept; any block may lose everything.

    Args:
        scores: importance of every unit, larger = more important, one tensor of shape (units,) per block.
        constraints: limits that must all hold.
        multiple: neurons are kept in chunks of this size, the first of them in two halves (so 64 allows widths
            0, 32, 64, 128, …), since kernels are slower at other widths; 1 = any number of neurons.
        head_rate: multiplies the scores of heads: how much a head's score is worth in neurons' scores.

    Returns:
        The kept units; equal scores are kept in the order of blocks and of units.

    Raises:
        InvalidBudget: no sub-network meets all constraints; the message states the nearest feasible budget.
        SecateurError: scores do not fit the costs or are not finite, or `multiple` or `head_rate` is not positive.
    """
    _check(scores, constraints, multiple, head_rate)
    full = SubNetwork(*(tuple((True,) * len(t) for t in kind) for kind in (scores.heads, scores.neurons)))
    for constraint in constraints:
        check_feasible(constraint, full)
    blocks = _blocks(scores, constraints, multiple, head_rate)
    spare = np.array([c.limit - c.summed.fixed for c in constraints])
    tables = [i for i, c in enumerate(constraints) if not isinstance(c.cost, LinearCost)]
    spare[tables] -= 1e-9 * np.abs(spare[tables])  # milliseconds are no integers: keep clear of rounding in sums
    choice = _with_prices(blocks, spare, tables[0]) if tables else _enumerate_heads(blocks, spare)
    choice = choice or _one_head(blocks, spare)
    if choice is None:
        names = ", ".join(str(c.term or c.kind) for c in constraints)
        raise InvalidBudget(f"No sub-network meets {names} together: loosen one of them.")
    return _subnetwork(scores, blocks, _top_up(blocks, spare, choice))


def widths_of(units: int, multiple: int) -> Integers:
    """Widths on offer for a feed-forward block: 0, half a chunk, whole chunks, everything."""
    edges = {0, multiple // 2, *range(multiple, units, multiple), units}
    return np.array(sorted(edge for edge in edges if edge <= units), dtype=np.int64)


def _check(scores: UnitScores, constraints: Sequence[Constraint], multiple: int, head_rate: float) -> None:
    if not constraints:
        raise InvalidBudget("There is no limit to meet: give a budget such as 'macs<=60%'.")
    if multiple < 1 or not head_rate > 0:
        raise SecateurError(f"multiple={multiple}, head_rate={head_rate}: both must be positive.")
    for kind, tensors in (("heads", scores.heads), ("neurons", scores.neurons)):
        for index, tensor in enumerate(tensors):
            if not torch.isfinite(tensor).all():
                raise SecateurError(f"Scores of {kind} in block {index} are not finite: check the model and the data.")
        for constraint in constraints:
            if len(getattr(constraint.summed, kind)) != len(tensors):
                raise SecateurError(
                    f"Scores are for {len(tensors)} blocks of {kind}, the {constraint.kind} cost for another model."
                )


def _blocks(scores: UnitScores, constraints: Sequence[Constraint], multiple: int, head_rate: float) -> list[Options]:
    def options(kind: UnitKind, index: int, tensor: Tensor, widths: Integers, rate: float) -> Options:
        ranked = np.sort(tensor.detach().cpu().double().numpy())[::-1]
        values = rate * np.concatenate(([0.0], np.cumsum(ranked)))[widths]
        costs = np.array([c.summed.block(kind, index, widths.tolist()) for c in constraints], dtype=np.float64)
        return Options(kind, index, widths, values, costs)

    heads = [options("heads", i, t, np.arange(len(t) + 1), head_rate) for i, t in enumerate(scores.heads)]
    neurons = [options("neurons", i, t, widths_of(len(t), multiple), 1.0) for i, t in enumerate(scores.neurons)]
    return heads + neurons


# --- linear costs: for every number of heads, the best neurons that the rest pays for ---------------------------------


@dataclass(frozen=True)
class _Ranking:
    """Steps to the next wider option of a block, best value per cost first, with running sums.

    Attributes:
        block: index of each step's block, shape (steps,).
        value: of all steps up to here, shape (steps + 1,).
        cost: the same, shape (constraints, steps + 1).
    """

    block: Integers
    value: Array
    cost: Array

    def fitting(self, left: Array) -> int:
        """Number of steps that the budget left, shape (constraints,), pays for."""
        return _fitting(self.cost, left)

    def choice(self, steps: int, blocks: int) -> Choice:
        return np.bincount(self.block[:steps], minlength=blocks).tolist()


@dataclass(frozen=True)
class _Chunks:
    """The best neurons in chunks of several sizes, all neurons costing the same: exact for every number of them.

    Attributes:
        frontier: capacity = number of granules.
        cost: of 0, 1, … granules, shape (constraints, granules + 1).
        first: number of blocks before those in the frontier.
    """

    frontier: Frontier
    cost: Array
    first: int

    @property
    def value(self) -> Array:
        return self.frontier.values

    def fitting(self, left: Array) -> int:
        """Number of granules that the budget left, shape (constraints,), pays for."""
        return _fitting(self.cost, left)

    def choice(self, granules: int, blocks: int) -> Choice:
        return [0] * self.first + self.frontier.choice(granules)


def _fitting(costs: Array, left: Array) -> int:
    """Longest prefix whose running costs, shape (constraints, prefixes), all stay within the budget left."""
    return min(int(np.searchsorted(cost, rest, side="right")) - 1 for cost, rest in zip(costs, left, strict=True))


def _enumerate_heads(blocks: list[Options], spare: Array) -> Choice | None:
    """Try every number of heads beside the best neurons that then fit; None if not even one head fits."""
    heads, neurons = _rank(blocks, "heads", spare), _neurons(blocks, spare)
    useful = np.maximum.accumulate(neurons.value)  # a step of negative score is never worth taking
    best: tuple[float, int, int] | None = None
    for k in range(min(1, len(heads.block)), len(heads.block) + 1):
        left = spare - heads.cost[:, k]
        if (left < 0).any():
            continue
        n = neurons.fitting(left)
        value = heads.value[k] + useful[n]
        if best is None or value > best[0]:
            best = (value, k, n)
    if best is None:
        return None
    _, k, n = best
    if neurons.value[n] < useful[n]:
        n = int(np.argmax(neurons.value[: n + 1]))
    return [a + b for a, b in zip(heads.choice(k, len(blocks)), neurons.choice(n, len(blocks)), strict=True)]


def _rank(blocks: list[Options], kind: UnitKind, spare: Array) -> _Ranking:
    """Order the steps of all blocks of a kind by density, keeping each block's own order."""
    owner, density, value, cost = [], [], [], []
    for index, block in enumerate(blocks):
        if block.kind != kind:
            continue
        gains, prices = np.diff(block.values), np.diff(block.costs, axis=1)
        # sorted scores make densities fall within a block; rounding must not change that
        density.append(np.minimum.accumulate(_density(gains, prices, spare)))
        owner.append(np.full(len(gains), index, dtype=np.int64))
        value.append(gains)
        cost.append(prices)
    if not owner:
        return _Ranking(np.zeros(0, dtype=np.int64), np.zeros(1), np.zeros((len(spare), 1)))
    order = np.argsort(-np.concatenate(density), kind="stable")
    zero = np.zeros((len(spare), 1))
    prices = np.concatenate(cost, axis=1)[:, order]
    equal = np.allclose(prices, prices[:, :1], rtol=1e-12, atol=0.0)  # then a product, which rounds less than a sum
    running = prices[:, :1] * np.arange(1, len(order) + 1) if equal else np.cumsum(prices, axis=1)
    return _Ranking(
        np.concatenate(owner)[order],
        np.concatenate(([0.0], np.cumsum(np.concatenate(value)[order]))),
        np.concatenate((zero, running), axis=1),
    )


def _neurons(blocks: list[Options], spare: Array) -> _Ranking | _Chunks:
    """Neurons ranked one step after the other if steps are equal or costs differ by block, else the exact chunks."""
    ffn = [block for block in blocks if block.kind == "neurons" and len(block.widths) > 1]
    steps = {int(step) for block in ffn for step in np.diff(block.widths)}
    units = {tuple(block.costs[:, -1] / block.widths[-1]) for block in ffn}
    if len(steps) < 2 or len(units) > 1:
        return _rank(blocks, "neurons", spare)
    granule = math.gcd(*steps)
    first = next(i for i, block in enumerate(blocks) if block.kind == "neurons")
    sizes = [block.widths // granule for block in blocks[first:]]
    capacity = int(sum(size[-1] for size in sizes))
    frontier = solve(sizes, [block.values for block in blocks[first:]], capacity)
    cost: Array = granule * np.array(units.pop())[:, None] * np.arange(capacity + 1.0)
    return _Chunks(frontier, cost, first)


def _density(gains: Array, prices: Array, spare: Array) -> Array:
    """Value per cost, shape (steps,); a cost is the sum of the shares of each spare budget that it takes."""
    share = (prices / np.maximum(spare, np.finfo(float).tiny)[:, None]).sum(axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        density: Array = np.where(share > 0, gains / share, np.where(gains > 0, np.inf, 0.0))
    return density


# --- latency tables: one width per block ------------------------------------------------------------------------------


def _with_prices(blocks: list[Options], spare: Array, table: int) -> Choice | None:
    """Meet the table's limit by dynamic programming, the others by the smallest prices under which they hold."""
    priced: Flags = np.zeros(len(spare), dtype=np.bool_)
    choice = _knapsack(blocks, spare, table, np.zeros(len(spare)))
    while choice is not None and (over := _used(blocks, choice) > spare).any():
        if priced[over].any():
            return None  # a limit stays broken whatever its price
        priced |= over
        choice = _lowest_prices(blocks, spare, table, priced)
    return choice


def _lowest_prices(blocks: list[Options], spare: Array, table: int, priced: Flags) -> Choice | None:
    """Bisect the logarithm of a common price, per share of the spare budget, until the priced limits just hold."""
    worth = sum(float(np.abs(block.values).max()) for block in blocks)
    unit = np.where(priced, worth / np.maximum(spare, np.finfo(float).tiny), 0.0)
    low, high = -30.0, 30.0
    choice = _knapsack(blocks, spare, table, unit * 2.0**high)
    for _ in range(30):
        middle = (low + high) / 2
        tried = _knapsack(blocks, spare, table, unit * 2.0**middle)
        if tried is not None and (_used(blocks, tried) <= spare)[priced].all():
            high, choice = middle, tried
        else:
            low = middle
    return choice


def _knapsack(blocks: list[Options], spare: Array, table: int, prices: Array) -> Choice | None:
    """Greatest value minus priced costs with the table's cost within its limit and at least one head, if that fits."""
    total = sum(float(block.costs[table].max()) for block in blocks)
    tick = total / TICKS if total > 0 else 1.0
    capacity = min(int(spare[table] / tick), TICKS + len(blocks))  # rounding up may add a tick per block
    steps = [np.ceil(block.costs[table] / tick - 1e-9).astype(np.int64) for block in blocks]
    values = [block.values - prices @ block.costs for block in blocks]
    heads = [block.kind == "heads" and len(block.widths) > 1 for block in blocks]
    needed = sum(block.kind == "heads" for block in blocks) if any(heads) else 0
    frontier = solve(steps, values, capacity, needed)
    return frontier.choice(capacity) if np.isfinite(frontier.values[capacity]) else None


# --- both -----------------------------------------------------------------------------------------------------------


def _used(blocks: list[Options], choice: Choice) -> Array:
    """Cost of a choice without the fixed parts, shape (constraints,)."""
    used: Array = np.sum([block.costs[:, option] for block, option in zip(blocks, choice, strict=True)], axis=0)
    return used


def _one_head(blocks: list[Options], spare: Array) -> Choice | None:
    """The most valuable single head that fits, where the budget is too small for the search's steps."""
    heads = [i for i, block in enumerate(blocks) if block.kind == "heads" and len(block.widths) > 1]
    fitting = [i for i in heads if (blocks[i].costs[:, 1] <= spare).all()]
    if not fitting:
        return None
    best = max(fitting, key=lambda i: blocks[i].values[1])
    return [int(i == best) for i in range(len(blocks))]


def _top_up(blocks: list[Options], spare: Array, choice: Choice) -> Choice:
    """Spend what rounding and chunks left over: widen blocks, best value per cost first, while anything fits."""
    choice = list(choice)
    while True:
        left = spare - _used(blocks, choice)
        best: tuple[float, int, int] | None = None
        for index, block in enumerate(blocks):
            now = choice[index]
            gains = block.values[now + 1 :] - block.values[now]
            prices = block.costs[:, now + 1 :] - block.costs[:, [now]]
            fits = (prices <= left[:, None]).all(axis=0) & (gains > 0)
            density = np.where(fits, _density(gains, prices, spare), -1.0)
            if len(density) and density.max() > 0 and (best is None or density.max() > best[0]):
                best = (float(density.max()), index, now + 1 + int(density.argmax()))
        if best is None:
            return choice
        choice[best[1]] = best[2]


def _subnetwork(scores: UnitScores, blocks: list[Options], choice: Choice) -> SubNetwork:
    """The highest scores of each block, as many as the chosen width."""
    masks: dict[UnitKind, list[Tensor]] = {"heads": [], "neurons": []}
    for block, option in zip(blocks, choice, strict=True):
        tensor = (scores.heads if block.kind == "heads" else scores.neurons)[block.index]
        ranked = torch.argsort(tensor.detach().cpu().double(), descending=True, stable=True)
        mask = torch.zeros(len(tensor))
        mask[ranked[: int(block.widths[option])]] = 1
        masks[block.kind].append(mask)
    return SubNetwork.from_masks(masks["heads"], masks["neurons"])
