"""Search spaces: bounds, round trips and sizes, with numbers of the specification for the shape of BERT-base."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise

import numpy as np
import pytest

from secateur.errors import SecateurError, UnsupportedModel
from secateur.families import sites
from secateur.optimize.spaces import Kind, Space
from secateur.subnetwork import SubNetwork
from tests.conftest import tiny_model

KINDS: tuple[Kind, ...] = ("small", "medium", "layer", "large")
FLOOR, FULL = 23_257_346, 108_311_810  # BERT-base-cased with two labels: embeddings, pooler, head; everything


def tiny(kind: Kind, multiple: int = 1) -> Space:
    return Space(kind, (4, 4, 4), (48, 48, 48), multiple)


def bert(kind: Kind, multiple: int = 1) -> Space:
    return Space(kind, (12,) * 12, (3072,) * 12, multiple)


def paper_size(sub: SubNetwork) -> int:
    """Parameters as the paper counts them: the output projection in full for any head (spec 3)."""
    attention = sum(3 * h * (768 * 64 + 64) + 768 * 768 + 3 * 768 for h in sub.head_widths if h)
    return FLOOR + attention + sum(2 * 768 * u + u + 3 * 768 for u in sub.neuron_widths if u)


def test_the_papers_sizes() -> None:
    space = bert("small")
    assert paper_size(space.decode((12, 12, 3072))) == FULL
    assert paper_size(space.decode((0, 5, 7))) == FLOOR
    assert paper_size(space.decode((6, 6, 1536))) == 46_304_258


@pytest.mark.parametrize("multiple", [1, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_bounds_are_reached_and_vectors_come_back(kind: Kind, multiple: int) -> None:
    space, draw = tiny(kind, multiple), random.Random(0)
    full = space.decode(space.highest)
    assert full.keeps_everything
    assert space.encode(full) == space.highest
    nothing = space.decode(tuple(v.low for v in space.variables))
    assert not any(map(any, (*nothing.heads, *nothing.neurons)))
    for values in [*(space.sample(draw) for _ in range(50)), space.smallest, space.midpoint]:
        sub = space.decode(values)
        assert space.decode(space.encode(sub)) == sub
    seen = {i: {space.sample(draw)[i] for _ in range(400)} for i in (0, len(space.variables) - 1)}
    for i, found in seen.items():
        variable = space.variables[i]
        assert {variable.low, variable.high} <= found


def test_small_keeps_the_first_of_everything() -> None:
    sub = tiny("small").decode((2, 3, 10))
    assert sub.heads == ((True, True, True, False),) * 2 + ((False,) * 4,)
    assert sub.neuron_widths == (10, 10, 0)
    assert all(mask == tuple(i < 10 for i in range(48)) for mask in sub.neurons[:2])
    assert tiny("small").decode((0, 1, 1)) == tiny("small").decode((0, 4, 48))  # the same network, without layers
    assert tiny("small", 20).decode((3, 1, 3)).neuron_widths == (48, 48, 48)  # the last step is what is left
    assert tiny("small", 20).decode((3, 1, 2)).neuron_widths == (40, 40, 40)


def test_the_other_spaces() -> None:
    assert tiny("medium").decode((0, 5, 4, 0, 1, 48)).head_widths == (0, 4, 1)
    assert tiny("medium").decode((0, 5, 4, 0, 1, 48)).neuron_widths == (5, 0, 48)
    assert tiny("layer").decode((1, 0, 1)).head_widths == (4, 0, 4)
    large = tiny("large")
    assert len(large.variables) == 3 * (4 + 48)
    values = [0] * 156
    values[52 + 2], values[52 + 4 + 7] = 1, 1
    sub = large.decode(values)
    assert sub.heads[1] == (False, False, True, False)
    assert [i for i, kept in enumerate(sub.neurons[1]) if kept] == [7]
    assert sub.head_widths == (0, 1, 0)


def test_smallest_and_midpoint() -> None:
    assert [tiny(kind).smallest for kind in KINDS[:3]] == [(1, 1, 1), (1,) * 6, (0, 0, 0)]
    sub = tiny("large").decode(tiny("large").smallest)
    assert (sub.head_widths, sub.neuron_widths) == ((1, 0, 0), (1, 0, 0))
    assert tiny("small").midpoint == (1, 2, 24)
    assert tiny("layer").midpoint == (1, 0, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_mutation_changes_one_entry_within_bounds(kind: Kind) -> None:
    space, draw = tiny(kind), random.Random(1)
    values, changed = space.midpoint, set()
    for _ in range(300):
        other = space.mutated(values, draw)
        differ = [i for i, (a, b) in enumerate(zip(values, other, strict=True)) if a != b]
        assert len(differ) == 1
        space.decode(other)
        changed.add(differ[0])
        values = other
    assert len(changed) > min(len(space.variables), 100) * 0.8


def shares(kind: Kind, sample: Callable[[Space, random.Random], tuple[int, ...]], count: int = 600) -> list[float]:
    """Quantiles of size over full size at 5, 50 and 95 %."""
    space, draw = bert(kind), random.Random(0)
    sizes = [paper_size(space.decode(sample(space, draw))) / FULL for _ in range(count)]
    return [float(q) for q in np.quantile(sizes, (0.05, 0.5, 0.95))]


def test_sizes_crowd_where_the_specification_says() -> None:
    assert shares("small", Space.sample) == pytest.approx([0.215, 0.400, 0.749], abs=0.03)
    assert shares("medium", Space.sample) == pytest.approx([0.555, 0.635, 0.713], abs=0.02)
    assert shares("layer", Space.sample) == pytest.approx([0.215, 0.542, 0.935], abs=0.07)  # here 12 of 12 too


@pytest.mark.parametrize("kind", ["small", "medium", "layer"])
def test_stratified_draws_cover_all_sizes(kind: Kind) -> None:
    low, middle, high = shares(kind, lambda space, draw: space.stratified(draw, paper_size), 100)
    assert low < 0.35
    assert 0.5 < middle < 0.72  # uniform between 0.215 and 1: 0.61
    assert high > 0.9


def test_more_units_never_cost_less() -> None:
    space = bert("small")
    for i in range(3):
        values = [list(space.midpoint) for _ in range(3)]
        for step, each in enumerate(values):
            each[i] = (1, space.midpoint[i], space.highest[i])[step]
        sizes = [paper_size(space.decode(each)) for each in values]
        assert all(a < b for a, b in pairwise(sizes))


def test_a_model_gives_its_space() -> None:
    assert Space.of("small", sites(tiny_model("bert"))) == tiny("small")
    for family in ("bart", "t5"):
        with pytest.raises(UnsupportedModel, match="several stacks"):
            Space.of("small", sites(tiny_model(family)))


def test_what_is_out_of_the_space_is_refused() -> None:
    with pytest.raises(SecateurError, match="'heads' lies between 1 and 4, both included, not at 5"):
        tiny("small").decode((1, 5, 1))
    with pytest.raises(SecateurError, match="has 3 variables, not 2"):
        tiny("layer").decode((1, 1))
    with pytest.raises(SecateurError, match="A space is small, medium, layer, large, not 'huge'"):
        Space("huge", (4,), (4,))  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="multiples of 1 or more"):
        tiny("small", 0)
    with pytest.raises(SecateurError, match="a model that has lost whole blocks is not searched"):
        Space("small", (), ())
    ragged = tiny("medium").decode((1, 5, 4, 9, 0, 0))
    with pytest.raises(SecateurError, match="not in the space 'small'"):
        tiny("small").encode(ragged)
