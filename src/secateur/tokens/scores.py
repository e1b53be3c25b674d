"""Which tokens the attention context uses, and how many: token scores, ACC, elimination profile.

Pure functions on tensors. LATE's paper (Kachuee & Sharifkhani, arXiv 2201.03327) names the Attention Context
Contribution (ACC) and the word-vector elimination profile without printing their formulas in what is public; the ones
here satisfy what it states, and are named after what they compute.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from secateur.errors import SecateurError

Acc = Literal["mass", "participation", "entropy", "count"]
Weighting = Literal["attention", "value"]

SHORT = 4
"""Texts of up to this many times the queries that score are scored by all of theirs: on a CPU, attention of so few
tokens is written out as fast as a fused kernel computes it."""


def asking(lengths: Tensor, queries: int, *, tokens: int, causal: bool = False) -> Tensor:
    """Which queries of each example score its tokens: so many of a long one, all of one up to `SHORT` times as long.

    They lie at even distances. In a decoder they are the last ones, which what comes next resembles most (SnapKV,
    arXiv 2404.14469).

    Args:
        lengths: real tokens n of each example, which come first, (batch,).
        queries: so many are asked.
        tokens: the most that an example may have.
        causal: the last ones.

    Returns:
        (batch, most asked of an example) places of the queries, ascending; -1 at the end of rows that ask fewer.
    """
    n = lengths[:, None]
    long = n > SHORT * queries
    count = torch.where(long, queries, n)
    # a graph may not depend on values
    width: Any = torch.sym_min(SHORT * queries, tokens) if torch.compiler.is_exporting() else int(count.max())
    steps = torch.arange(width, device=lengths.device)
    places = n - count + steps if causal else torch.where(long, steps * n // queries, steps)
    return torch.where(steps < count, places, -1)


def column_attention(
    probabilities: Tensor,
    real: Tensor,
    *,
    diagonal: bool = True,
    values: Tensor | None = None,
    causal: bool = False,
    places: Tensor | None = None,
) -> Tensor:
    """How much of the attention context each token supplies.

    S_j = 1/(H·|q|) Σ_h Σ_{i in q} A_h[i, j]: the mean attention that the real tokens q pay to token j; uniform
    attention gives 1/|q|. The query rows of padding are left out, since they would change the ranking.

    Args:
        probabilities: softmax of attention before dropout, (batch, heads, queries, keys); computed with in float64 if
            they are.
        real: True for real tokens, (batch, keys).
        diagonal: count what a token pays to itself.
        values: (batch, heads, keys, head width); given, each head's attention is weighted by ‖v_j‖, which makes S_j
            the size of token j's contribution to the context. The scores are then scaled to a sum of 1.
        causal: token i sees tokens 0 … i only, which favours early ones: each sum is divided by the one under uniform
            causal attention, Σ_{i ≥ j} 1/(i + 1), or Σ_{i > j} without the diagonal, i in q. Real tokens come first.
        places: (batch, queries) the keys' places of the queries, -1 for those that do not count (`asking`); None if
            every token asks, in order.

    Returns:
        (batch, keys), detached, float32; -inf for padding.
    """
    attention = probabilities.detach()
    attention = attention if attention.dtype == torch.float64 else attention.float()
    counted = (real if places is None else places >= 0).to(attention.dtype)
    whole = not torch.compiler.is_exporting() and bool(counted.all())  # a graph may not depend on values
    columns = (attention if whole else attention * counted[:, None, :, None]).sum(dim=2)
    if not diagonal and places is None:
        columns = columns - attention.diagonal(dim1=-2, dim2=-1) * counted[:, None]
    elif not diagonal and places is not None:
        own = places.clamp_min(0)[:, None, :, None].expand(*attention.shape[:3], 1)
        paid = attention.gather(3, own) * counted[:, None, :, None]
        columns = columns.scatter_add(2, own.squeeze(3), -paid.squeeze(3))
    if values is not None:
        columns = columns * values.detach().to(columns.dtype).norm(dim=-1)
    total = columns.sum(dim=1)
    if causal:
        total = total / _uniform_causal(real, diagonal, places)
    if values is None and causal:
        score = total / attention.shape[1]
    elif values is None:
        score = total / (attention.shape[1] * counted.sum(dim=-1, keepdim=True).clamp_min(1))
    else:
        score = total / (total * real).sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return score.float().masked_fill(~real, -math.inf)


def _uniform_causal(real: Tensor, diagonal: bool, places: Tensor | None) -> Tensor:
    """Column sums of uniform causal attention, (batch, keys); 1 for padding, and where nothing looks."""
    share = real / torch.arange(1, real.shape[1] + 1, device=real.device)
    if places is not None:
        asked = torch.zeros_like(real).float().scatter_add(1, places.clamp_min(0), (places >= 0).float())
        share = share * asked
    after = share.flip(-1).cumsum(-1).flip(-1)
    if not diagonal:
        after = torch.cat([after[:, 1:], after.new_zeros(len(after), 1)], dim=1)
    return after.masked_fill(~real | (after == 0), 1)


def smoothed(score: Tensor, before: Tensor | None, beta: float) -> Tensor:
    """Exponential averaging over layers: S̄ˡ = β · renorm(S̄ˡ⁻¹ on the survivors) + (1 - β) · Sˡ.

    Args:
        score: Sˡ, (batch, tokens), -inf for padding.
        before: S̄ˡ⁻¹ at the same tokens, or None in the first layer.
        beta: weight of the layers before.
    """
    if before is None or beta == 0:
        return score
    real = score.isfinite()
    kept = before.masked_fill(~real, 0)
    kept = kept / kept.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(kept.dtype).tiny)
    return (beta * kept + (1 - beta) * score).masked_fill(~real, -math.inf)


def context_size(score: Tensor, functional: Acc = "mass", *, rho: float = 0.95, tau: float = 0.5) -> Tensor:
    """ACC of each example: the share of its tokens that the attention context really uses, in (0, 1].

    With p the scores of the n real tokens, scaled to a sum of 1:

    * mass: the smallest k whose k largest scores hold a share ρ of the sum, over n;
    * participation: 1 / Σ p², over n;
    * entropy: exp(-Σ p ln p), over n;
    * count: the number of tokens with p ≥ τ/n, over n.

    Args:
        score: (batch, tokens), -inf for padding.
        functional: one of the above.
        rho: ρ, for mass.
        tau: τ, for count.

    Returns:
        (batch,) float32.
    """
    real = score.isfinite()
    n = real.sum(dim=-1).clamp_min(1).float()
    p = score.masked_fill(~real, 0)
    p = p / p.sum(dim=-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    if functional == "mass":
        held = p.sort(dim=-1, descending=True).values.cumsum(dim=-1)
        used = (held < rho - 1e-6).sum(dim=-1) + 1.0
        used = torch.minimum(used, n)
    elif functional == "participation":
        used = 1 / p.square().sum(dim=-1).clamp_min(torch.finfo(torch.float32).tiny)
    elif functional == "entropy":
        used = torch.exp(torch.special.entr(p).sum(dim=-1))
    elif functional == "count":
        used = (real & (p >= tau / n[:, None])).sum(dim=-1).clamp_min(1).float()
    else:
        raise SecateurError(f"acc is one of {', '.join(get_args(Acc))}, not '{functional}'.")
    return (used / n).clamp(max=1.0)


def profile(acc: Sequence[float]) -> tuple[float, ...]:
    """Elimination profile m: the running minimum of ACC over the layers, since tokens cannot come back."""
    m, least = [], 1.0
    for value in acc:
        if not 0 < value <= 1:
            raise SecateurError(f"ACC lies between 0 and 1, not at {value}.")
        least = min(least, value)
        m.append(least)
    return tuple(m)


def shares(m: Sequence[float], alpha: float, least: float = 0.02, steeper: Sequence[float] = ()) -> tuple[float, ...]:
    """Share of the tokens that each layer hands on: r_l = clip(m_l^α, least, 1); α = 0 is the dense model.

    With a second profile s for faster settings, which is reached at α = 2: r_l = m_l^(2-α) · s_l^(α-1) from α = 1 on,
    and s_l^(α-1) beyond 2.

    Args:
        m: elimination profile, at α = 1.
        alpha: the setting.
        least: floor of the shares.
        steeper: s, nowhere above m.
    """
    if alpha < 0:
        raise SecateurError(f"alpha is a number from 0 (dense) upwards, not {alpha}.")
    if not steeper or alpha <= 1:
        found = [value**alpha for value in m]
    else:
        slower = max(0.0, 2 - alpha)
        found = [value**slower * fast ** (alpha - 1) for value, fast in zip(m, steeper, strict=True)]
    return tuple(min(1.0, max(value, least)) for value in found)


def counts(lengths: Sequence[int], kept: Sequence[float], protected: int = 1) -> list[list[int]]:
    """Tokens that leave each layer: n_l = min(n_{l-1}, max(protected, ⌈r_l · n⌉)), for each example by itself.

    Args:
        lengths: real tokens n of each example.
        kept: r_l of each layer.
        protected: tokens that always stay.

    Returns:
        One list per layer, with one count per example.
    """
    found: list[list[int]] = []
    last = list(lengths)
    for share in kept:
        # the tolerance keeps 0.7 × 10 at 7
        last = [
            min(before, max(protected, math.ceil(share * n - 1e-6))) for before, n in zip(last, lengths, strict=True)
        ]
        found.append(last)
    return found
