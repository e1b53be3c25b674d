"""Elastic binarization of weights and activations, with the gradients of BiT (Liu et al., arXiv 2205.13016).

Every quantiser gives *levels*, whole numbers held in floats, and the scale to multiply them by, so that a product of
two quantised operands is a product of whole numbers, exact in float32, times a scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor

from secateur.errors import SecateurError

BITS = (1, 2, 4, 8)
LEAST_ALPHA = 1e-5
LEAST_SCALE = 1e-12
MOST_ZEROS = 7 / 8
"""Share of a sample that first scales of signed levels may round to 0."""
Estimate = Literal["mean", "analytic", "search"]


@dataclass(frozen=True)
class Levels:
    """The whole numbers that an activation is rounded to.

    Attributes:
        bits: 1, 2, 4 or 8.
        signed: {-1, 1} at one bit and -2^(b-1) … 2^(b-1) - 1 at more; unsigned 0 … 2^b - 1, for what is never
            negative: probabilities and what a ReLU gives.
    """

    bits: int
    signed: bool

    def __post_init__(self) -> None:
        if self.bits not in BITS or isinstance(self.bits, bool):
            raise SecateurError(f"An activation has 1, 2, 4 or 8 bits, not {self.bits!r}.")

    @property
    def is_sign(self) -> bool:
        """Whether the levels are -1 and 1."""
        return self.signed and self.bits == 1

    @property
    def lowest(self) -> int:
        return -(2 ** (self.bits - 1)) if self.signed else 0

    @property
    def highest(self) -> int:
        return max(2 ** (self.bits - 1) - 1, 1) if self.signed else int(2**self.bits - 1)


def to_levels(x: Tensor, alpha: Tensor, shift: Tensor | None, levels: Levels) -> Tensor:
    """Round to levels: sgn(x - β) with sgn(0) = 1 for {-1, 1}; else ⌊clip((x - β)/α, low, high) + ½⌋.

    The straight-through gradients are those of y = α · levels in spec and paper (eq. 7 to 9): inside the window
    |x - β| ≤ α, or low ≤ u ≤ high with u = (x - β)/α, dy/dx = 1 and dy/dβ = -1; dy/dα is the level itself for {-1, 1},
    else level - u inside and the level outside. The part of dy/dα that the factor α gives is left to autograd.

    Args:
        x: activations, (..., channels).
        alpha: α > 0, a scalar.
        shift: β of each channel, (channels,); 0 if None.
        levels: what to round to.

    Returns:
        Whole numbers in x's dtype.
    """
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (x, alpha, shift)):
        return cast(Tensor, _Rounded.apply(x, alpha, shift, levels))
    return _rounded(x, alpha, shift, levels)


def _rounded(x: Tensor, alpha: Tensor, shift: Tensor | None, levels: Levels) -> Tensor:
    moved = x if shift is None else x - shift
    if levels.is_sign:
        return _signs(moved) if shift is None else _signs_(moved)
    u = moved.to(torch.promote_types(moved.dtype, torch.float32)) / alpha  # half precision has no ½ above 128
    return u.clamp_(levels.lowest, levels.highest).add_(0.5).floor_().clamp_(max=levels.highest).to(x.dtype)


def _signs(x: Tensor) -> Tensor:
    """Sgn(x), with sgn(0) = 1; several times faster than `torch.where` of two numbers."""
    return x.ge(0).to(x.dtype).mul_(2).sub_(1)


def _signs_(x: Tensor) -> Tensor:
    """The same in place, without a tensor of booleans."""
    return x.ge_(0).mul_(2).sub_(1)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, alpha: Tensor, shift: Tensor | None, levels: Levels) -> Tensor:
        ctx.save_for_backward(x, alpha, shift)
        ctx.levels = levels
        return _rounded(x, alpha, shift, levels)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
        x, alpha, shift = ctx.saved_tensors
        moved = x if shift is None else x - shift
        if ctx.levels.is_sign:
            to_x = moved.abs().le_(alpha).mul_(grad).div_(alpha)
            to_alpha = torch.zeros_like(alpha)
        else:
            u = moved / alpha
            to_x = u.clamp(ctx.levels.lowest, ctx.levels.highest).eq_(u).mul_(grad).div_(alpha)
            to_alpha = -(to_x * u).sum().to(alpha.dtype)
        to_shift = None if shift is None else -to_x.flatten(0, -2).sum(0).to(shift.dtype)
        return to_x, to_alpha, to_shift, None


def scaled_gradient(x: Tensor, factor: float) -> Tensor:
    """X itself, with `factor` times its gradient."""
    return cast(Tensor, _ScaledGradient.apply(x, factor))


class _ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad * ctx.factor, None


def binarized(weight: Tensor, *, rows: bool = False) -> tuple[Tensor, Tensor]:
    """Weights as signs and a scale: W_b = s · sgn(W - e), e = mean W and s = mean |W| (spec 1, eq. 5 of the paper).

    The gradient goes straight through, dL/dW = dL/dW_b, with no window and none through s and e. Means are those of
    differences to a first entry: of ±s they are exactly s, so that binarizing what is binary changes no bit.

    Args:
        weight: latent weights, (out, in).
        rows: a scale and a centre for each row instead of one for the matrix.

    Returns:
        Signs ±1, of the weight's shape, and the scale: (out,) with rows, else a scalar.
    """
    values = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
    values = values if rows else values.reshape(1, -1)
    sizes = values.abs()
    first = sizes[:, :1].clone()
    scale = first + sizes.sub_(first).mean(dim=1, keepdim=True)
    moved = values - values[:, :1]
    signs = _signs_(moved.sub_(moved.mean(dim=1, keepdim=True))).view_as(weight).to(weight.dtype)
    scale = scale.clamp_min(LEAST_SCALE).to(weight.dtype)
    scale = scale if rows else scale.squeeze()
    if torch.is_grad_enabled() and weight.requires_grad:
        signs = cast(Tensor, _Through.apply(weight, signs, scale))
    return signs, scale.flatten() if rows else scale


class _Through(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, signs: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return signs

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (scale,) = ctx.saved_tensors
        return grad / scale, None, None


def first_alpha(x: Tensor, levels: Levels, how: Estimate) -> Tensor:
    """α to begin with, from a sample of activations.

    Args:
        x: a sample, any shape.
        levels: what they will be rounded to.
        how: "mean" takes the released code's 2 mean|x| / √(highest level) for signed and 4 mean|x| / √(highest level)
            for unsigned levels. "analytic", of one bit, takes the paper's mean|x|, or for {0, 1} the mean of what is at
            least ½ ("mean" if nothing is, and of more bits). "search" takes, of 96 between a thousandth and all of
            max|x|, the α with the least ‖x - α · levels‖², but for signed levels none by which more than `MOST_ZEROS`
            of the values round to 0: with 2 bits one channel of outliers, such as a LayerNorm gives, would leave
            nothing else.

    Returns:
        A positive scalar, in float32.
    """
    values = x.detach().float().flatten()
    size = values.abs()
    mean = (2 if levels.signed else 4) * size.mean() / levels.highest**0.5
    if how == "analytic" and levels.bits == 1:
        high = values[values >= 0.5]
        mean = size.mean() if levels.signed else (high.mean() if len(high) else mean)
    if how == "search":
        tried = size.max() / levels.highest * torch.logspace(-3, 0, 96, device=values.device)
        rounded = [_rounded(values, a, None, levels) for a in tried]
        errors = torch.stack([(values - a * found).square().sum() for a, found in zip(tried, rounded, strict=True)])
        if levels.signed:
            zeros = torch.stack([found.eq(0).float().mean() for found in rounded])
            errors[(zeros > MOST_ZEROS) & (zeros > zeros.min())] = torch.inf
        mean = tried[errors.argmin()]
    return mean.clamp_min(LEAST_ALPHA)
