"""The four search spaces of structural pruning by search (Klein et al., TMLR 2024, arXiv 2405.02267).

A point of a space is a vector of whole numbers, each between bounds that are both reachable; `decode` gives the
sub-network, so that vectors which mean the same network (a model without layers has no widths) meet there. In SMALL and
MEDIUM a block keeps its *first* units: sort them by importance first (`order`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from secateur.errors import SecateurError, UnsupportedModel
from secateur.families import Sites
from secateur.subnetwork import Mask, SubNetwork

Kind = Literal["small", "medium", "layer", "large"]
Values = tuple[int, ...]
TRIES = 32
"""Draws from which the one nearest to a wanted size is taken."""


@dataclass(frozen=True)
class Variable:
    """A whole number from `low` to `high`, both included."""

    name: str
    low: int
    high: int


@dataclass(frozen=True)
class Space:
    """Which sub-networks of a model are searched.

    Attributes:
        kind: "small": one number of layers, heads and neurons for the model, the first layers stay; "medium": numbers
            of heads and neurons for each layer; "layer": each layer there or not; "large": each head and each neuron.
        heads: heads of each layer.
        neurons: neurons of each layer.
        multiple: neurons are kept in multiples of this many, in "small" and "medium"; all of them can stay.
    """

    kind: Kind
    heads: tuple[int, ...]
    neurons: tuple[int, ...]
    multiple: int = 1

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise SecateurError(f"A space is {', '.join(get_args(Kind))}, not {self.kind!r}.")
        if type(self.multiple) is not int or self.multiple < 1:
            raise SecateurError(f"Neurons are kept in multiples of 1 or more, not of {self.multiple!r}.")
        if not self.heads or len(self.heads) != len(self.neurons) or min(*self.heads, *self.neurons) < 1:
            raise SecateurError(
                "A space needs layers, each with heads and neurons; a model that has lost whole blocks is not searched "
                "again: search the one that it was cut from."
            )

    @classmethod
    def of(cls, kind: Kind, found: Sites, multiple: int = 1) -> Space:
        """The space of a model.

        Raises:
            UnsupportedModel: it is no single stack of layers with one attention block each.
        """
        stacks = {site.stack for site in found}
        if len(stacks) > 1 or len(found.heads) != len(found.neurons):
            raise UnsupportedModel(
                f"A {found.family.name} model has several stacks or cross-attention: sub-networks are searched in "
                "encoders and decoders of one stack."
            )
        return cls(kind, tuple(s.units for s in found.heads), tuple(s.units for s in found.neurons), multiple)

    @cached_property
    def variables(self) -> tuple[Variable, ...]:
        """What a vector's entries are; heads and neurons of a layer stand side by side in "medium" and "large"."""
        layers = range(len(self.heads))
        if self.kind == "small":
            heads, steps = max(self.heads), self._steps(max(self.neurons))
            return Variable("layers", 0, len(layers)), Variable("heads", 1, heads), Variable("neurons", 1, steps)
        if self.kind == "layer":
            return tuple(Variable(f"layer {i}", 0, 1) for i in layers)
        found = []
        for i in layers:
            if self.kind == "medium":
                found.append(Variable(f"heads {i}", 0, self.heads[i]))
                found.append(Variable(f"neurons {i}", 0, self._steps(self.neurons[i])))
            else:
                found += [Variable(f"head {i}.{j}", 0, 1) for j in range(self.heads[i])]
                found += [Variable(f"neuron {i}.{j}", 0, 1) for j in range(self.neurons[i])]
        return tuple(found)

    @property
    def highest(self) -> Values:
        """The vector of the full model."""
        return tuple(variable.high for variable in self.variables)

    @property
    def smallest(self) -> Values:
        """The smallest network that training uses.

        One layer, head and step of neurons; one of each in every layer; no layers; one head and one neuron.
        """
        if self.kind == "large":
            first = {0, self.heads[0]}
            return tuple(int(i in first) for i in range(len(self.variables)))
        return tuple(1 if self.kind != "layer" else 0 for _ in self.variables)

    @property
    def midpoint(self) -> Values:
        """Half way between the bounds, rounded down; of yes and no, every second one stays."""
        return tuple(
            (i + 1) % 2 if (v.low, v.high) == (0, 1) else (v.low + v.high) // 2 for i, v in enumerate(self.variables)
        )

    def decode(self, values: Sequence[int]) -> SubNetwork:
        """The sub-network of a vector.

        Raises:
            SecateurError: it has another length, or an entry out of bounds.
        """
        self._check(values)
        layers = range(len(self.heads))
        if self.kind == "small":
            count, heads, steps = values
            each = [(heads, steps) if i < count else (0, 0) for i in layers]
        elif self.kind == "medium":
            each = [(values[2 * i], values[2 * i + 1]) for i in layers]
        elif self.kind == "layer":
            each = [(kept * self.heads[i], kept * self._steps(self.neurons[i])) for i, kept in enumerate(values)]
        else:
            return self._masks(values)
        return SubNetwork(
            tuple(_first(n, units) for (n, _), units in zip(each, self.heads, strict=True)),
            tuple(_first(n * self.multiple, units) for (_, n), units in zip(each, self.neurons, strict=True)),
        )

    def encode(self, sub: SubNetwork) -> Values:
        """A vector that `decode` makes this sub-network of.

        Raises:
            SecateurError: it is not in the space.
        """
        layers = range(len(self.heads))
        heads, steps = sub.head_widths, [-(-width // self.multiple) for width in sub.neuron_widths]
        values: list[int] = []
        if self.kind == "small":
            count = sum(1 for width in heads if width)
            values = [count, max(1, *heads), max(1, *steps)]
        for i in layers:
            if self.kind == "medium":
                values += [heads[i], steps[i]]
            elif self.kind == "layer":
                values.append(int(heads[i] > 0))
            elif self.kind == "large":
                values += map(int, (*sub.heads[i], *sub.neurons[i]))
        if len(sub.heads) != len(layers) or self.decode(values) != sub:
            raise SecateurError(f"This sub-network is not in the space '{self.kind}'.")
        return tuple(values)

    def sample(self, draw: random.Random) -> Values:
        """Every entry uniform between its bounds; of "layer" and "large" first how many stay, then which."""
        if self.kind in ("small", "medium"):
            return tuple(draw.randint(v.low, v.high) for v in self.variables)
        count = len(self.variables)
        kept = set(draw.sample(range(count), draw.randint(0, count)))
        return tuple(int(i in kept) for i in range(count))

    def stratified(self, draw: random.Random, cost: Callable[[SubNetwork], float]) -> Values:
        """A vector whose cost is nearly uniform between the cheapest and the dearest network.

        Independent entries crowd around the middle: nearly all of "medium" is about two thirds of BERT's size. Of
        `TRIES` draws, each thinned out or filled up by a share of its own, the one nearest to a wanted cost is taken.

        Args:
            draw: the source of chance.
            cost: of a sub-network, more for more units.
        """
        low = cost(self.decode(tuple(v.low for v in self.variables)))
        wanted = draw.uniform(low, cost(self.decode(self.highest)))
        tried = [self._tilted(draw) for _ in range(TRIES)]
        return min(tried, key=lambda values: abs(cost(self.decode(values)) - wanted))

    def mutated(self, values: Sequence[int], draw: random.Random) -> Values:
        """The vector with one entry, drawn uniformly, changed to another value of it."""
        self._check(values)
        free = [i for i, v in enumerate(self.variables) if v.high > v.low]
        i = draw.choice(free)
        v = self.variables[i]
        other = draw.randint(v.low, v.high - 1)
        return (*values[:i], other + (other >= values[i]), *values[i + 1 :])

    def _tilted(self, draw: random.Random) -> Values:
        """A draw that leans to few or to many units as a whole."""
        lean = draw.random()
        if self.kind in ("layer", "large"):
            return tuple(int(draw.random() < lean) for _ in self.variables)
        half = min(lean, 1 - lean)
        return tuple(
            v.low + round((v.high - v.low) * min(1.0, max(0.0, draw.uniform(lean - half, lean + half))))
            for v in self.variables
        )

    def _steps(self, units: int) -> int:
        return -(-units // self.multiple)

    def _masks(self, values: Sequence[int]) -> SubNetwork:
        """The masks that a vector of "large" lists, layer by layer."""
        rest = iter(values)
        heads: list[Mask] = []
        neurons: list[Mask] = []
        for head_count, neuron_count in zip(self.heads, self.neurons, strict=True):
            heads.append(tuple(bool(next(rest)) for _ in range(head_count)))
            neurons.append(tuple(bool(next(rest)) for _ in range(neuron_count)))
        return SubNetwork(tuple(heads), tuple(neurons))

    def _check(self, values: Sequence[int]) -> None:
        if len(values) != len(self.variables):
            raise SecateurError(f"The space '{self.kind}' has {len(self.variables)} variables, not {len(values)}.")
        for value, variable in zip(values, self.variables, strict=True):
            if not variable.low <= value <= variable.high:
                raise SecateurError(
                    f"'{variable.name}' lies between {variable.low} and {variable.high}, both included, not at {value}."
                )


def _first(count: int, units: int) -> Mask:
    count = min(count, units)
    return (True,) * count + (False,) * (units - count)
