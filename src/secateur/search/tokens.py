"""The share of its tokens that each layer must hand on, by what the model's output loses without the others."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

UNREAD = 1e-6
"""Share of a layer whose tokens nothing reads but the protected ones: at any setting of the dial those alone remain."""


def sufficient_shares(
    change: Callable[[tuple[float, ...]], float],
    layers: int,
    tolerance: float,
    *,
    least: float = 0.02,
    precision: float = 1 / 32,
) -> list[float]:
    """For each layer the smallest share of the tokens that keeps the output, if layers before hand on everything.

    ACC_l = min { r : change(1, …, 1, r, …, r) ≤ tolerance }, with r from layer l on, found by bisection between `least`
    and the share of the layer before: what a layer needs beyond that cannot reach it.

    Args:
        change: change of the output, 0 for none, as a function of the share that each layer hands on.
        layers: number of layers.
        tolerance: the change that is accepted.
        least: the smallest share that is tried.
        precision: of the shares; the larger end of the last interval is taken. A layer that needs everything gets
            1 - precision, so that a faster setting of the dial reaches it too.

    Returns:
        A share in (0, 1] for each layer, never rising; `UNREAD` where the smallest changes nothing at all.
    """
    found: list[float] = []
    high = 1.0 - precision
    for layer in range(layers):

        def of(share: float, before: int = layer) -> float:
            return change((1.0,) * before + (share,) * (layers - before))

        least_change = of(least)
        if least_change <= 1e-3 * tolerance:
            found += [UNREAD] * (layers - layer)
            break
        low = least
        if least_change <= tolerance:
            high = min(high, least)
        while high - low > precision:
            middle = (low + high) / 2
            if of(middle) <= tolerance:
                high = middle
            else:
                low = middle
        found.append(high)
    return found


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
