"""Milliseconds of a model at several settings of its dial, measured here, and the setting for a wanted latency."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from secateur.costs.analytic import evaluation
from secateur.costs.timers import Timing, pass_of, sample, summarise
from secateur.costs.tokens import FASTEST
from secateur.errors import InvalidBudget

if TYPE_CHECKING:
    from secateur.edits.tokens import Dial

GRID = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 8.0, 12.0)
"""Speed-ups that a wanted latency is looked for among, as far as the model reaches."""


def time_settings(
    model: nn.Module,
    dial: Dial,
    alphas: Sequence[float],
    batch: int,
    tokens: int,
    *,
    seconds: float = 4.0,
    min_runs: int = 10,
) -> list[Timing]:
    """Time forward passes at several settings, in turns; the dial itself is not touched.

    Args:
        model: a model with a dial.
        dial: its dial.
        alphas: settings of the dial; 0 is the dense model.
        batch: examples per pass.
        tokens: tokens per example.
        seconds: how long to measure all of them together.
        min_runs: passes at each setting to measure even if that takes longer.
    """
    forward = pass_of(model, batch, tokens)

    def at(alpha: float) -> Callable[[], None]:
        def run() -> None:
            with dial.at(alpha):
                forward()

        return run

    with evaluation(model), torch.inference_mode():
        samples = sample({str(i): at(alpha) for i, alpha in enumerate(alphas)}, seconds, min_runs)
    return [summarise(values, model, batch, tokens) for values in samples.values()]


def alpha_for_latency(
    model: nn.Module, dial: Dial, milliseconds: float, batch: int, tokens: int, *, seconds: float = 4.0
) -> float:
    """The smallest setting, between those of `GRID` and the reach, whose measured median meets a latency.

    Raises:
        InvalidBudget: none does; the message gives the fastest.
    """
    reach = dial.speedup_at(FASTEST, tokens)
    alphas = [dial.alpha_for(speedup, tokens) for speedup in (*(k for k in GRID if k < reach), reach)]
    medians = [timing.median for timing in time_settings(model, dial, alphas, batch, tokens, seconds=seconds)]
    found = interpolated(alphas, medians, milliseconds)
    if found is None:
        raise InvalidBudget(
            f"{milliseconds:g} ms cannot be met at batch {batch} and {tokens} tokens: the fastest setting takes "
            f"{min(medians):.3g} ms here."
        )
    return found


def interpolated(alphas: Sequence[float], medians: Sequence[float], milliseconds: float) -> float | None:
    """The smallest setting on the piecewise linear curve that meets a latency; None if the curve stays above it."""
    before: tuple[float, float] | None = None
    for alpha, median in zip(alphas, medians, strict=True):
        if median <= milliseconds:
            if before is None:
                return alpha
            part = (before[1] - milliseconds) / (before[1] - median)
            return before[0] + part * (alpha - before[0])
        before = (alpha, median)
    return None
