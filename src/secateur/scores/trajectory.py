"""Trajectory importance: how much the later feature maps and the output move when a unit is removed.

The maths of OPTIN (Khaki & Plataniotis, ICLR 2024), as pure functions on tensors. For the unit j of layer l

    score_j = Σ_{z>l} ||G'_z - G_z||_F² / ||G_z||_F²  +  λ_c · ρ · D(output', output)

where G_z is the cosine similarity of sampled tokens in the feature map of layer z, a prime marks the network without
the unit, D is a divergence of the outputs, and ρ = ΣM / ΣQ brings both terms to one scale for all units alike.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.subnetwork import SubNetwork, UnitScores

TINY = 1e-12


def unit_tokens(features: Tensor) -> Tensor:
    """Token vectors scaled to length one; features (..., tokens, hidden). A zero vector stays zero."""
    return features / features.norm(dim=-1, keepdim=True).clamp_min(TINY)


def cosine_gram(features: Tensor) -> Tensor:
    """Cosine similarity of every pair of tokens: (..., tokens, hidden) → (..., tokens, tokens)."""
    unit = unit_tokens(features)
    return unit @ unit.mT


def manifold_distance(teacher: Tensor, student: Tensor, *, normalise: bool = True) -> Tensor:
    """||G_teacher - G_student||_F² of two feature maps at the same tokens, shape (tokens, hidden) each.

    Args:
        teacher: features of the intact network.
        student: features of the masked one; leading dimensions, if any, are variants.
        normalise: divide by ||G_teacher||_F², so that layers are comparable. False is the published sum form, which
            never exceeds 4·tokens².

    Returns:
        One value per variant. Computed from the change of the features (see `gram_change`).
    """
    before = unit_tokens(teacher)
    change = gram_change(before, unit_tokens(student))
    return change / gram_norm(before).square() if normalise else change


def gram_norm(unit: Tensor) -> Tensor:
    """||A Aᵀ||_F for A of shape (tokens, hidden), by the smaller of A Aᵀ and Aᵀ A, which share it."""
    product = unit @ unit.mT if unit.shape[-2] <= unit.shape[-1] else unit.mT @ unit
    return product.norm().clamp_min(TINY)


def gram_change(before: Tensor, after: Tensor) -> Tensor:
    """||A'A'ᵀ - AAᵀ||_F² for A (tokens, hidden) and A' (..., tokens, hidden).

    With Δ = A' - A and B = (A' + A)/2 the difference is ΔBᵀ + BΔᵀ: no subtraction of nearly equal Grams. For many
    tokens the (hidden × hidden) products give the same number: 2⟨ΔᵀΔ, BᵀB⟩ + 2⟨ΔᵀB, (ΔᵀB)ᵀ⟩.
    """
    delta, middle = after - before, (after + before) / 2
    if before.shape[-2] <= 3 * before.shape[-1]:
        half = delta @ middle.mT
        return (half + half.mT).square().sum((-1, -2))
    cross = delta.mT @ middle
    straight = (delta.mT @ delta) * (middle.mT @ middle)
    return 2 * (straight + cross * cross.mT).sum((-1, -2)).clamp_min(0)


def kl_divergence(teacher: Tensor, student: Tensor, temperature: float = 4.0) -> Tensor:
    """T²·KL(softmax(teacher/T) || softmax(student/T)) over the last axis, ≥ 0, in float64.

    The factor T² keeps the value of the order of the squared logit difference: as T → ∞ it tends to half the mean
    squared difference of the centred logits. With δ = log p - log q the sum is taken of p·(δ + e^(-δ) - 1), which is
    the same since p and q sum to one, but has no negative terms that nearly cancel the positive ones.
    """
    p = torch.log_softmax(teacher.double() / temperature, -1)
    delta = p - torch.log_softmax(student.double() / temperature, -1)
    return temperature**2 * (p.exp() * (delta + torch.expm1(-delta))).sum(-1).clamp_min(0)


def squared_difference(teacher: Tensor, student: Tensor) -> Tensor:
    """Σ (student - teacher)² over the last axis, in float64: the divergence of a regression output."""
    return (student.double() - teacher.double()).square().sum(-1)


@dataclass
class UnitGradients:
    """Sampled directions in which units act: for each block a matrix of shape (samples, units).

    Rows are scaled so that Σ_rows g_j² is the score of unit j and Σ_rows (Σ_{j∈S} g_j)² the joint cost of removing the
    set S, to second order. Rows of different blocks share their samples.
    """

    heads: list[Tensor]
    neurons: list[Tensor]

    def scores(self) -> UnitScores:
        """The diagonal: Σ_rows g²."""
        return UnitScores([g.square().sum(0) for g in self.heads], [g.square().sum(0) for g in self.neurons])


@dataclass
class TrajectoryScores:
    """The two terms of the trajectory importance, apart, so that λ_c can be chosen afterwards.

    Attributes:
        trajectory: Σ_z manifold distance of every unit.
        output: divergence of the output of every unit.
        trajectory_gradients: the samples behind `trajectory`, if they were kept.
        output_gradients: the samples behind `output`, if they were kept.
    """

    trajectory: UnitScores
    output: UnitScores
    trajectory_gradients: UnitGradients | None = None
    output_gradients: UnitGradients | None = None


def output_share(scores: TrajectoryScores) -> float:
    """ρ = ΣM / ΣQ over all scored units, 0 if no unit moves the output."""
    moved = sum(float(q.nansum()) for q in (*scores.output.heads, *scores.output.neurons))
    bent = sum(float(m.nansum()) for m in (*scores.trajectory.heads, *scores.trajectory.neurons))
    return bent / moved if moved > 0 else 0.0


def combine(scores: TrajectoryScores, lambda_c: float = 0.1) -> UnitScores:
    """M + λ_c·ρ·Q for every unit, with one ρ for all (`output_share`)."""
    weight = lambda_c * output_share(scores)
    trajectory, output = scores.trajectory, scores.output
    return UnitScores(
        [m + weight * q for m, q in zip(trajectory.heads, output.heads, strict=True)],
        [m + weight * q for m, q in zip(trajectory.neurons, output.neurons, strict=True)],
    )


def combine_gradients(scores: TrajectoryScores, lambda_c: float = 0.1) -> UnitGradients:
    """The samples of both terms stacked, so that Σ_rows g² equals `combine(scores, lambda_c)`.

    Raises:
        SecateurError: the scores were made without `keep_gradients=True`.
    """
    bent, moved = scores.trajectory_gradients, scores.output_gradients
    if bent is None or moved is None:
        raise SecateurError("These scores hold no gradients: call probe_scores(..., keep_gradients=True).")
    weight = (lambda_c * output_share(scores)) ** 0.5
    return UnitGradients(
        [torch.cat((m, weight * q)) for m, q in zip(bent.heads, moved.heads, strict=True)],
        [torch.cat((m, weight * q)) for m, q in zip(bent.neurons, moved.neurons, strict=True)],
    )


def refined(scores: TrajectoryScores, exact: TrajectoryScores) -> TrajectoryScores:
    """`scores` with the units that `exact` holds (not NaN) replaced; both must come from the same batches and seed."""

    def merged(old: list[Tensor], new: list[Tensor]) -> list[Tensor]:
        return [torch.where(n.isnan(), o, n.to(o)) for o, n in zip(old, new, strict=True)]

    def both(old: UnitScores, new: UnitScores) -> UnitScores:
        return UnitScores(merged(old.heads, new.heads), merged(old.neurons, new.neurons))

    return TrajectoryScores(both(scores.trajectory, exact.trajectory), both(scores.output, exact.output))


def near_cut(scores: UnitScores, sub: SubNetwork, share: float = 0.15) -> SubNetwork:
    """The units whose fate is least certain: `share` of the heads and of the neurons, on both sides of the cut.

    Units of a kind are ranked by score; those whose rank is nearest to the number of removed units are taken.

    Returns:
        A `SubNetwork` whose True entries are the units to score exactly (`exact_scores(units=…)`).
    """

    def nearest(values: list[Tensor], masks: tuple[tuple[bool, ...], ...]) -> list[Tensor]:
        flat = torch.cat([v.double().cpu() for v in values]) if values else torch.zeros(0)
        rank = flat.argsort().argsort()
        removed = sum(not keep for mask in masks for keep in mask)
        distance = (rank.double() + 0.5 - removed).abs()
        chosen = torch.zeros(len(flat), dtype=torch.bool)
        chosen[distance.argsort()[: round(share * len(flat))]] = True
        return list(chosen.split([len(v) for v in values]))

    return SubNetwork.from_masks(nearest(scores.heads, sub.heads), nearest(scores.neurons, sub.neurons))
