"""The share of its tokens that each layer must hand on, by what the model's output loses without the others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

UNREAD = 1e-6
"""Share of a layer whose tokens nothing reads but the protected ones: at any setting of the dial those alone remain."""

SHARES = (0.85, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08)
"""Shares at which changes are measured, beside the least one."""

EVERYTHING = 63 / 64
"""Of a layer that needs all its tokens: below 1, so that a faster setting of the dial reaches it too."""

NOTHING = 1e-6
"""A change below this is rounding."""


@dataclass(frozen=True)
class Changes:
    """Change of the output when one layer and all later ones hand on a share of the tokens.

    Attributes:
        shares: falling, from 1.
        table: for each layer the change at each share, never falling; layers after the last one are not read at all.
        layers: number of layers.
    """

    shares: tuple[float, ...]
    table: tuple[tuple[float, ...], ...]
    layers: int

    @classmethod
    def measure(cls, change: Callable[[tuple[float, ...]], float], layers: int, least: float) -> Changes:
        """Measure layer by layer.

        Args:
            change: change of the output, 0 for none, as a function of the share that each layer hands on.
            layers: number of layers.
            least: the smallest share.
        """
        shares = (1.0, *(share for share in SHARES if share > least), least)
        table: list[tuple[float, ...]] = []
        for layer in range(layers):
            found = [0.0]
            for share in reversed(shares[1:]):  # the least one first: it may show that nothing is read
                found.insert(1, change((1.0,) * layer + (share,) * (layers - layer)))
                if share == least and found[1] <= NOTHING:
                    return cls(shares, tuple(table), layers)
            table.append(tuple(accumulate(found, max)))
        return cls(shares, tuple(table), layers)

    def sufficient(self, tolerance: float) -> tuple[float, ...]:
        """ACC_l = min { r : the change at r, interpolated, is within a tolerance }, as a running minimum.

        A layer cannot use more than the one before hands on. `UNREAD` for layers that nothing reads.
        """
        found: list[float] = []
        for row in self.table:
            share = self.shares[-1]
            for (r0, c0), (r1, c1) in pairwise(zip(self.shares, row, strict=True)):
                if c1 > tolerance:
                    share = r0 - (r0 - r1) * (tolerance - c0) / (c1 - c0)
                    break
            found.append(min([share, EVERYTHING, *found[-1:]]))
        return (*found, *(UNREAD,) * (self.layers - len(found)))

    def sufficient_for(self, speedup: Callable[[tuple[float, ...]], float], wanted: float) -> tuple[float, ...]:
        """ACC at the smallest tolerance, by bisection, whose shares are as fast as wanted, or at the largest one.

        Args:
            speedup: of the shares that the layers hand on.
            wanted: what it should be.
        """
        low, high = 0.0, max((row[-1] for row in self.table), default=0.0)
        for _ in range(40):
            middle = (low + high) / 2
            if speedup(self.sufficient(middle)) < wanted:
                low = middle
            else:
                high = middle
        return self.sufficient(high)


def relative_change(found: Tensor, wanted: Tensor) -> float:
    """Squared distance of two outputs over the variance of the wanted one, so that 1 is as bad as a constant output.

    Classes share an arbitrary offset, so that each row's mean is taken out first where there are several.

    Args:
        found: (rows, outputs).
        wanted: (rows, outputs).
    """
    if wanted.shape[-1] > 1:
        found, wanted = (part - part.mean(dim=-1, keepdim=True) for part in (found, wanted))
    spread = (wanted - wanted.mean(dim=0)).square().sum()
    return float((found - wanted).square().sum() / spread.clamp_min(torch.finfo(torch.float32).tiny))
