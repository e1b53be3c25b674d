"""MACs of an encoder whose layers hand on fewer and fewer tokens, and the dial setting for a wanted speed-up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn

from secateur.costs.analytic import macs
from secateur.errors import InvalidBudget, SecateurError
from secateur.families import sites
from secateur.tokens.scores import counts, shares

FASTEST = 1e6
"""A dial setting beyond which nothing changes."""

PRECISION = 1e-4
"""Of the dial setting that bisection finds."""


@dataclass(frozen=True)
class LayerCost:
    """MACs of one layer: attention reads n_in tokens, the feed-forward block n_out.

    M = fixed + linear · n_in + square · n_in² + ffn · n_out. Of BERT: linear 4d², square 2d, ffn 2·d·f.
    """

    fixed: float
    linear: float
    square: float
    ffn: float

    def of(self, n_in: float, n_out: float) -> float:
        """MACs for one example."""
        return self.fixed + self.linear * n_in + self.square * n_in**2 + self.ffn * n_out


@dataclass(frozen=True)
class TokenCosts:
    """The layers of an encoder, in order."""

    layers: tuple[LayerCost, ...]

    def macs(self, tokens: int, kept: Sequence[int]) -> float:
        """MACs of all layers for one example of so many tokens, of which layer l hands on `kept[l]`."""
        entering = (tokens, *kept[:-1])
        return sum(layer.of(n_in, n_out) for layer, n_in, n_out in zip(self.layers, entering, kept, strict=True))

    def speedup(self, tokens: int, kept: Sequence[int]) -> float:
        """K: MACs of the dense layers over those with elimination."""
        return self.macs(tokens, [tokens] * len(self.layers)) / self.macs(tokens, kept)

    def at(
        self,
        m: Sequence[float],
        alpha: float,
        tokens: int,
        least: float,
        protected: int,
        steeper: Sequence[float] = (),
    ) -> float:
        """K at a dial setting."""
        kept = [row[0] for row in counts([tokens], shares(m, alpha, least, steeper), protected)]
        return self.speedup(tokens, kept)

    def solve(
        self,
        m: Sequence[float],
        speedup: float,
        tokens: int,
        least: float,
        protected: int,
        steeper: Sequence[float] = (),
    ) -> float:
        """The smallest α, to `PRECISION`, whose speed-up is at least the wanted one, by bisection.

        Args:
            m: elimination profile.
            speedup: wanted K.
            tokens: length at which K counts.
            least: floor of the shares.
            protected: tokens that always stay.
            steeper: profile of faster settings (`tokens.scores.shares`).

        Raises:
            SecateurError: below 1.
            InvalidBudget: beyond reach; the message gives the largest speed-up.
        """
        if not isinstance(speedup, (int, float)) or not speedup >= 1:
            raise SecateurError(f"A speed-up is a number of at least 1 (the dense model), not {speedup!r}.")
        if speedup == 1:
            return 0.0
        low, high = 0.0, 1.0
        reach = self.at(m, FASTEST, tokens, least, protected, steeper)
        if reach < speedup:
            raise InvalidBudget(
                f"A speed-up of {speedup:g} is beyond this model's reach at {tokens} tokens: the largest is "
                f"{math.floor(100 * reach) / 100:g}."
            )
        while self.at(m, high, tokens, least, protected, steeper) < speedup:
            high *= 2
        while high - low > PRECISION:
            middle = (low + high) / 2
            if self.at(m, middle, tokens, least, protected, steeper) < speedup:
                low = middle
            else:
                high = middle
        return high


def token_costs(model: nn.Module) -> TokenCosts:
    """Cost of each layer as a function of its tokens, fitted to counted passes at three lengths (the fit is exact).

    Args:
        model: a text encoder of a known family, sliced or not.
    """
    found = sites(model)
    lengths = np.array([2.0, 4.0, 8.0])
    counted = [macs(model, 1, int(n)) for n in lengths]
    powers = np.stack([lengths**0, lengths, lengths**2], axis=1)
    layers = []
    for index, (heads, neurons) in enumerate(zip(found.heads, found.neurons, strict=True)):
        attention = [cost.heads[index] * heads.units for cost in counted]
        fixed, linear, square = np.linalg.solve(powers, attention)
        ffn = counted[0].neurons[index] * neurons.units / lengths[0]
        layers.append(LayerCost(*(round(float(v), 3) for v in (fixed, linear, square, ffn))))
    return TokenCosts(tuple(layers))
