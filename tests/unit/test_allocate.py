"""The best sub-network under a budget: spec counts, brute force, invariants."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from secateur.costs.analytic import LinearCost
from secateur.costs.budget import Constraint
from secateur.costs.latency import Curve, LatencyTable, Timing
from secateur.errors import InvalidBudget, SecateurError
from secateur.optimize.allocate import allocate, widths_of
from secateur.optimize.knapsack import solve
from secateur.subnetwork import SubNetwork, UnitScores

TIMING = Timing(1.0, 1.0, 1, 1, "float32", 1, 1)


def random_scores(heads: list[int], neurons: list[int], seed: int = 0) -> UnitScores:
    generator = torch.Generator().manual_seed(seed)
    return UnitScores(
        [torch.rand(n, generator=generator) for n in heads], [torch.rand(n, generator=generator) for n in neurons]
    )


def uniform(scores: UnitScores, head: float, neuron: float, fixed: float = 0.0) -> LinearCost:
    return LinearCost(fixed, (head,) * len(scores.heads), (neuron,) * len(scores.neurons))


def everything(scores: UnitScores) -> SubNetwork:
    return SubNetwork(tuple((True,) * len(t) for t in scores.heads), tuple((True,) * len(t) for t in scores.neurons))


def value(scores: UnitScores, sub: SubNetwork, head_rate: float = 1.0) -> float:
    heads, neurons = sub.masks(torch.float64)
    kept_heads = sum(float((m * t.double()).sum()) for m, t in zip(heads, scores.heads, strict=True))
    return head_rate * kept_heads + sum(
        float((m * t.double()).sum()) for m, t in zip(neurons, scores.neurons, strict=True)
    )


def best_of(tensor: torch.Tensor, width: int) -> tuple[bool, ...]:
    kept = set(torch.argsort(tensor, descending=True, stable=True)[:width].tolist())
    return tuple(i in kept for i in range(len(tensor)))


def all_subnetworks(scores: UnitScores, multiple: int) -> Iterator[SubNetwork]:
    """Every combination of widths with at least one head."""
    head_widths = itertools.product(*(range(len(t) + 1) for t in scores.heads))
    neuron_widths = list(itertools.product(*(widths_of(len(t), multiple).tolist() for t in scores.neurons)))
    for heads in head_widths:
        if sum(heads):
            for neurons in neuron_widths:
                yield SubNetwork(
                    tuple(best_of(t, w) for t, w in zip(scores.heads, heads, strict=True)),
                    tuple(best_of(t, w) for t, w in zip(scores.neurons, neurons, strict=True)),
                )


# BERT-base: per head 4·L·d·d_h + 2·L²·d_h, per neuron 2·L·d; average MNLI length 39.05
MNLI = (7_872_729.92, 59_980.8)
L128 = (27_262_976.0, 196_608.0)


@pytest.mark.parametrize(
    ("costs", "share", "heads", "neurons"),
    [
        (MNLI, 0.6, 144, 14_558),
        (MNLI, 0.6, 96, 20_858),
        (MNLI, 0.6, 72, 24_008),
        (L128, 0.6, 144, 14_131),
        (L128, 0.6, 96, 20_787),
        (L128, 0.6, 72, 24_115),
        (L128, 0.5, 144, 8_448),
    ],
)
def test_counts_of_bert_base(costs: tuple[float, float], share: float, heads: int, neurons: int) -> None:
    scores = random_scores([12] * 12, [3072] * 12)
    ranked = sorted((float(v), b, i) for b, t in enumerate(scores.heads) for i, v in enumerate(t))
    for rank, (_, block, index) in enumerate(reversed(ranked)):  # exactly so many heads are worth keeping
        scores.heads[block][index] = 1e6 if rank < heads else 0.0
    cost = uniform(scores, *costs)
    limit = share * (144 * costs[0] + 36_864 * costs[1])
    if costs is MNLI and share == 0.6:
        assert limit == pytest.approx(2.006883e9, rel=1e-6)
    sub = allocate(scores, [Constraint("macs", limit, cost)], multiple=1)
    assert sum(sub.head_widths) == heads
    assert sum(sub.neuron_widths) == neurons
    assert limit - costs[1] < cost.of(sub) <= limit
    kept = torch.cat([t[torch.tensor(m)] for t, m in zip(scores.neurons, sub.neurons, strict=True)])
    cut = torch.cat([t[~torch.tensor(m)] for t, m in zip(scores.neurons, sub.neurons, strict=True)])
    assert kept.min() >= cut.max()  # the best of all blocks together


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("multiple", [1, 2, 4])
@pytest.mark.parametrize("share", [0.2, 0.4, 0.6, 0.9])
def test_linear_equals_brute_force(seed: int, multiple: int, share: float) -> None:
    scores = random_scores([2, 3], [5, 7], seed)
    cost = uniform(scores, 6.0, 2.0, fixed=3.0)
    limit = share * cost.of(everything(scores))
    sub = allocate(scores, [Constraint("macs", limit, cost)], multiple=multiple)
    best = max(value(scores, s) for s in all_subnetworks(scores, multiple) if cost.of(s) <= limit)
    assert cost.of(sub) <= limit
    assert value(scores, sub) == pytest.approx(best, rel=1e-12)
    assert all(w in widths_of(len(t), multiple) for w, t in zip(sub.neuron_widths, scores.neurons, strict=True))


@pytest.mark.parametrize("seed", range(3))
def test_two_linear_limits_equal_brute_force(seed: int) -> None:
    scores = random_scores([2, 3], [5, 6], seed)
    limits = [
        Constraint("macs", 30.0, uniform(scores, 6.0, 2.0)),
        Constraint("params", 22.0, uniform(scores, 2.0, 3.0)),
    ]
    sub = allocate(scores, limits, multiple=1)
    best = max(value(scores, s) for s in all_subnetworks(scores, 1) if all(c.met_by(s) for c in limits))
    assert all(c.met_by(sub) for c in limits)
    assert value(scores, sub) == pytest.approx(best, rel=1e-12)


def random_table(scores: UnitScores, seed: int) -> LatencyTable:
    """Curves with flat stretches and jumps, unlike any straight line."""
    generator = np.random.default_rng(seed)

    def curve(units: int) -> Curve:
        steps = generator.choice([0.0, 0.1, 1.0], size=units) * generator.random(units)
        return Curve(tuple(range(units + 1)), tuple(np.concatenate(([0.0], np.cumsum(steps))).tolist()))

    heads, neurons = (tuple(curve(len(t)) for t in kind) for kind in (scores.heads, scores.neurons))
    return LatencyTable(1.0, heads, neurons, TIMING)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_latency_equals_brute_force(seed: int, share: float) -> None:
    scores = random_scores([2, 3], [5, 6], seed)
    table = random_table(scores, seed)
    limit = table.fixed + share * (table.of(everything(scores)) - table.fixed)
    constraint = Constraint("latency", limit, table)
    sub = allocate(scores, [constraint], multiple=1)
    best = max(value(scores, s) for s in all_subnetworks(scores, 1) if constraint.met_by(s))
    assert constraint.met_by(sub)
    assert sum(sub.head_widths) >= 1
    assert value(scores, sub) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("seed", range(6))
def test_latency_and_linear_limits_together(seed: int) -> None:
    scores = random_scores([2, 3], [6, 6], seed)
    table = random_table(scores, seed)
    full = everything(scores)
    cost = uniform(scores, 5.0, 1.0)
    limits = [
        Constraint("params", 0.6 * cost.of(full), cost),
        Constraint("latency", 1.0 + 0.6 * (table.of(full) - 1.0), table),
    ]
    sub = allocate(scores, limits, multiple=1)
    assert all(c.met_by(sub) for c in limits)
    best = max(value(scores, s) for s in all_subnetworks(scores, 1) if all(c.met_by(s) for c in limits))
    assert value(scores, sub) >= 0.95 * best


@pytest.mark.parametrize("multiple", [1, 64])
def test_more_budget_is_never_worse(multiple: int) -> None:
    scores = random_scores([4] * 3, [200] * 3)
    cost = uniform(scores, 100.0, 3.0, fixed=50.0)
    full = cost.of(everything(scores))
    values = []
    for percent in range(10, 100, 3):
        sub = allocate(scores, [Constraint("macs", percent / 100 * full, cost)], multiple=multiple)
        assert cost.of(sub) <= percent / 100 * full
        values.append(value(scores, sub))
    assert values == sorted(values)


@pytest.mark.parametrize("multiple", [8, 64])
@pytest.mark.parametrize("kind", ["macs", "latency", "both"])
def test_nothing_more_fits(multiple: int, kind: str) -> None:
    scores = random_scores([4] * 3, [200] * 3, seed=3)
    linear, table = uniform(scores, 100.0, 3.0), random_table(scores, 3)
    found = [Constraint("macs", 0.55 * linear.of(everything(scores)), linear)] if kind != "latency" else []
    found += [Constraint("latency", 0.6 * table.of(everything(scores)), table)] if kind != "macs" else []
    sub = allocate(scores, found, multiple=multiple)
    assert all(c.met_by(sub) for c in found)
    for block, tensor in enumerate(scores.neurons):
        for width in widths_of(200, multiple):
            if width > sub.neuron_widths[block]:
                wider = list(sub.neurons)
                wider[block] = best_of(tensor, int(width))
                assert not all(c.met_by(SubNetwork(sub.heads, tuple(wider))) for c in found)


def test_costs_that_differ_by_block_are_met_and_spent() -> None:
    scores = random_scores([4, 4], [32, 32], seed=5)
    cost = LinearCost(7.0, (10.0, 3.0), (2.0, 1.0))
    limit = 0.5 * cost.of(everything(scores))
    for multiple in (1, 8):
        sub = allocate(scores, [Constraint("macs", limit, cost)], multiple=multiple)
        assert cost.of(sub) <= limit
        best = (
            max(value(scores, s) for s in all_subnetworks(scores, multiple) if cost.of(s) <= limit)
            if multiple > 1
            else 0
        )
        assert value(scores, sub) >= 0.97 * best


def test_chunks() -> None:
    assert widths_of(200, 64).tolist() == [0, 32, 64, 128, 192, 200]
    assert widths_of(128, 64).tolist() == [0, 32, 64, 128]
    assert widths_of(48, 64).tolist() == [0, 32, 48]
    assert widths_of(16, 64).tolist() == [0, 16]
    assert widths_of(3, 1).tolist() == [0, 1, 2, 3]
    assert widths_of(0, 64).tolist() == [0]


def test_one_head_stays_and_blocks_may_empty() -> None:
    scores = UnitScores([torch.tensor([0.0, 0.1]), torch.tensor([0.0, 0.0])], [torch.ones(4), torch.zeros(4)])
    cost = uniform(scores, 5.0, 1.0)
    sub = allocate(scores, [Constraint("macs", 9.0, cost)], multiple=1)
    assert sub == SubNetwork(((False, True), (False, False)), ((True,) * 4, (False,) * 4))
    flat = LatencyTable(0.0, (Curve((0, 2), (0.0, 10.0)),) * 2, (Curve((0, 4), (0.0, 4.0)),) * 2, TIMING)
    assert allocate(scores, [Constraint("latency", 9.5, flat)], multiple=1) == sub


def test_head_rate_trades_heads_for_neurons() -> None:
    scores = random_scores([4] * 2, [40] * 2)
    constraint = Constraint("macs", 100.0, uniform(scores, 10.0, 2.0))
    few, many = (allocate(scores, [constraint], multiple=1, head_rate=rate) for rate in (1e-3, 1e3))
    assert sum(few.head_widths) == 1
    assert sum(many.head_widths) == 8
    doubled = UnitScores([2 * t for t in scores.heads], scores.neurons)
    assert allocate(doubled, [constraint], multiple=1) == allocate(scores, [constraint], multiple=1, head_rate=2.0)


def test_invariant_to_scale_and_equivariant_to_order() -> None:
    scores = random_scores([4] * 2, [40] * 2, seed=7)
    constraint = Constraint("macs", 90.0, uniform(scores, 10.0, 2.0))
    sub = allocate(scores, [constraint], multiple=8)
    scaled = UnitScores([8 * t for t in scores.heads], [8 * t for t in scores.neurons])
    assert allocate(scaled, [constraint], multiple=8) == sub
    flipped = UnitScores([t.flip(0) for t in scores.heads], [t.flip(0) for t in scores.neurons])
    mirrored = allocate(flipped, [constraint], multiple=8)
    assert tuple(m[::-1] for m in mirrored.neurons) == sub.neurons
    assert tuple(m[::-1] for m in mirrored.heads) == sub.heads


def test_ties_go_to_the_first() -> None:
    scores = UnitScores([torch.ones(2)] * 2, [torch.ones(3)] * 2)
    sub = allocate(scores, [Constraint("macs", 9.0, uniform(scores, 2.0, 1.0))], multiple=1)
    assert sub == SubNetwork(((True, False), (False, False)), ((True,) * 3, (True,) * 3))
    assert sub == allocate(scores, [Constraint("macs", 9.0, uniform(scores, 2.0, 1.0))], multiple=1)


def test_harmful_units_are_not_kept_for_want_of_a_better_use() -> None:
    scores = UnitScores([torch.tensor([1.0, -1.0])], [torch.tensor([2.0, -3.0, 1.0, -0.5])])
    for multiple in (1, 2):
        sub = allocate(scores, [Constraint("macs", 5.0, uniform(scores, 1.0, 1.0))], multiple=multiple)
        assert sub == SubNetwork(((True, False),), ((True, False, True, False),))


def test_blocks_without_units() -> None:
    scores = random_scores([0, 3], [0, 70])
    linear = Constraint("macs", 60.0, uniform(scores, 10.0, 1.0))
    table = LatencyTable(
        0.0,
        (Curve((0,), (0.0,)), Curve((0, 3), (0.0, 30.0))),
        (Curve((0,), (0.0,)), Curve((0, 70), (0.0, 70.0))),
        TIMING,
    )
    for found in ([linear], [Constraint("latency", 60.0, table)], [linear, Constraint("latency", 60.0, table)]):
        sub = allocate(scores, found)
        assert sub.heads[0] == ()
        assert sub.neurons[0] == ()
        assert sub.head_widths[1] >= 1
        assert all(c.met_by(sub) for c in found)


def test_everything_fits() -> None:
    scores = random_scores([2], [10])
    linear = uniform(scores, 1.0, 1.0)
    assert allocate(scores, [Constraint("macs", 12.0, linear)]) == everything(scores)
    free = LatencyTable(1.0, (Curve((0, 2), (0.0, 0.0)),), (Curve((0, 10), (0.0, 0.0)),), TIMING)
    assert allocate(scores, [Constraint("latency", 1.0, free)]) == everything(scores)


def test_barely_feasible_budgets() -> None:
    scores = random_scores([2, 2], [8, 8])
    linear = uniform(scores, 10.0, 1.0, fixed=1.0)
    table = LatencyTable(
        1.0, (Curve((0, 2), (0.0, 2 / 3)),) * 2, (Curve((0, 8), (0.0, 1000.0)),) * 2, TIMING
    )  # one head costs less than a tick
    for constraint in (Constraint("macs", 11.0, linear), Constraint("latency", 1.0 + 1 / 3 + 1e-6, table)):
        sub = allocate(scores, [constraint], multiple=1)
        assert sum(sub.head_widths) == 1
        assert constraint.met_by(sub)


def test_infeasible_budgets() -> None:
    scores = random_scores([2, 2], [8, 8])
    with pytest.raises(InvalidBudget, match="still costs 11. The nearest feasible budget is macs<=11"):
        allocate(scores, [Constraint("macs", 10.0, uniform(scores, 10.0, 1.0, fixed=1.0))])
    jointly = [
        Constraint("macs", 5.0, LinearCost(0.0, (9.0, 1.0), (1.0, 1.0))),
        Constraint("params", 5.0, LinearCost(0.0, (1.0, 9.0), (1.0, 1.0))),
    ]
    with pytest.raises(InvalidBudget, match="No sub-network meets macs, params together"):
        allocate(scores, jointly)


def test_wrong_arguments() -> None:
    scores = random_scores([2], [8])
    constraint = Constraint("macs", 10.0, uniform(scores, 1.0, 1.0))
    with pytest.raises(InvalidBudget, match="no limit"):
        allocate(scores, [])
    with pytest.raises(SecateurError, match="must be positive"):
        allocate(scores, [constraint], multiple=0)
    with pytest.raises(SecateurError, match="must be positive"):
        allocate(scores, [constraint], head_rate=0.0)
    with pytest.raises(SecateurError, match="neurons in block 0 are not finite"):
        allocate(UnitScores(scores.heads, [torch.full((8,), math.nan)]), [constraint])
    with pytest.raises(SecateurError, match="for another model"):
        allocate(random_scores([2, 2], [8]), [constraint])


def test_knapsack_by_hand() -> None:
    steps = [np.array([0, 2, 3]), np.array([0, 1])]
    values = [np.array([0.0, 5.0, 6.0]), np.array([0.0, 2.0])]
    frontier = solve(steps, values, 4)
    assert frontier.values.tolist() == [0.0, 2.0, 5.0, 7.0, 8.0]
    assert [frontier.choice(c) for c in range(5)] == [[0, 0], [0, 1], [1, 0], [1, 1], [2, 1]]
    needed = solve(steps, [np.array([0.0, -5.0, -6.0]), values[1]], 4, needed=1)
    assert needed.values.tolist() == [-np.inf, -np.inf, -5.0, -3.0, -3.0]
    assert needed.choice(4) == [1, 1]
    assert solve(steps, values, 4, needed=2).choice(1) == [0, 1]


def test_latency_of_bert_base_is_spent() -> None:
    scores = random_scores([12] * 12, [3072] * 12)
    table = LatencyTable(
        5.0,
        (Curve((0, 1, 12), (0.0, 1.0, 2.0)),) * 12,
        (Curve((0, 64, 3072), (0.0, 0.5, 4.0)),) * 12,
        TIMING,
    )
    constraint = Constraint("latency", 40.0, table)
    sub = allocate(scores, [constraint])
    assert constraint.met_by(sub)
    assert table.of(sub) > 39.9
