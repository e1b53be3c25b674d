"""A mixture of two Gaussians as prior of a weight: a narrow spike, which draws small weights to zero, and a wide slab.

MGPP (Zhang, Sun & Liang, arXiv 2411.00969): π(w) = λ N(w; 0, v1) + (1 - λ) N(w; 0, v0), v0 ≪ v1. v0 and v1 are
variances.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from secateur.errors import SecateurError


@dataclass(frozen=True)
class MixturePrior:
    """The prior of one weight, or of a group of weights that live or die together.

    Attributes:
        slab_share: λ, probability of the slab.
        spike: v0, variance of the spike.
        slab: v1, variance of the slab.
        group: weights in a group; their prior is one mixture of two isotropic Gaussians.
    """

    slab_share: float
    spike: float
    slab: float
    group: int = 1

    def __post_init__(self) -> None:
        if not 0 < self.slab_share < 1:
            raise SecateurError(f"The slab's share lies between 0 and 1, not at {self.slab_share}.")
        if not 0 < self.spike <= self.slab < math.inf:
            raise SecateurError(
                f"The variances are 0 < spike <= slab, not {self.spike:g} and {self.slab:g}. Leave spike out, and it "
                "follows the learning rate."
            )

    @property
    def offset(self) -> float:
        """c1 = ln λ - ln(1 - λ) + m/2 (ln v0 - ln v1), of a group of m."""
        odds = math.log(self.slab_share) - math.log1p(-self.slab_share)
        return odds + 0.5 * self.group * (math.log(self.spike) - math.log(self.slab))

    @property
    def sharpness(self) -> float:
        """c2 = 1/(2 v0) - 1/(2 v1)."""
        return 0.5 / self.spike - 0.5 / self.slab

    @property
    def threshold(self) -> float:
        """w*: the size, or the norm of a group, at which spike and slab are equally likely; 0 if the slab always is."""
        if self.offset >= 0 or self.sharpness == 0:
            return 0.0
        return math.sqrt(-self.offset / self.sharpness)

    def spike_probability(self, squares: Tensor) -> Tensor:
        """G = sigmoid(-(c1 + c2 ‖w‖²)): the probability that a weight came from the spike.

        Args:
            squares: w², or ‖w‖² of groups, float32 or float64.
        """
        return squares.new_tensor(-self.offset).sub(squares, alpha=self.sharpness).sigmoid_()

    def precision(self, squares: Tensor) -> Tensor:
        """g/v0 + (1 - g)/v1: the prior draws a weight to zero by so much times the weight; shape and units of 1/w²."""
        # in place: this runs over every weight in every step
        return self.spike_probability(squares).mul_(1 / self.spike - 1 / self.slab).add_(1 / self.slab)

    def pull(self, weight: Tensor, squares: Tensor | None = None) -> Tensor:
        """-d/dw ln π(w) = w (g/v0 + (1 - g)/v1): what is added, over N, to the gradient of a mean loss.

        Args:
            weight: weights; half precision is computed in float32, where w² does not vanish.
            squares: ‖w‖² of each weight's group, of a shape that broadcasts to the weights'; w² if None.

        Returns:
            The pull, of the weights' shape, float32 or float64.
        """
        w = weight if weight.dtype == torch.float64 else weight.float()
        return self.precision(w.square() if squares is None else squares) * w


@cache  # asked for every matrix in every step
def spike_for(threshold: float, slab_share: float, slab: float) -> float:
    """v0, the variance of the spike whose threshold w* is as asked for: the inverse of `MixturePrior.threshold`.

    w*² (1/(2 v0) - 1/(2 v1)) = ln((1 - λ)/λ · √(v1/v0)), solved for the first v0 by iteration.

    Raises:
        SecateurError: no spike below the slab has it, or the slab's share is not one.
    """
    odds = -MixturePrior(slab_share, slab, slab).offset
    spike = threshold**2 / 20
    for _ in range(100):
        weight = odds + 0.5 * (math.log(slab) - math.log(spike)) if 0 < spike < slab else 0.0
        if weight <= 0:
            break
        before, spike = spike, threshold**2 * (1 - spike / slab) / (2 * weight)
        if abs(spike - before) <= 1e-12 * spike:
            return spike
    raise SecateurError(
        f"No spike below the slab of variance {slab:g} draws weights below {threshold:g} to zero: lower lr, which that "
        "follows, raise slab, or set spike."
    )
