"""Repair of a chosen sub-network without training: rearrangement, and least-squares tuning of the kept units.

Both after Kwon et al. (NeurIPS 2022). `rearrange` swaps kept and removed units of a block so that the removed ones
harm least together. `tune` goes through the network from its input and solves, block by block, for the output
projection that brings the pruned network's residual stream back to the teacher's; `fold_scales` writes the answer
into the weights, so that the result is a plain model.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import Site, Sites, axis, output_weight, sites
from secateur.progress import track
from secateur.scores.blockwise import BlockRuns
from secateur.scores.observe import Batches, Layer, layers, quiet
from secateur.scores.trajectory import UnitGradients
from secateur.subnetwork import Mask, SubNetwork

SANE = 10.0  # a scale beyond ±10 means that the least-squares problem was not well posed


# --- rearrangement --------------------------------------------------------------------------------


def rearrange(sub: SubNetwork, gradients: UnitGradients, *, sweeps: int = 1) -> SubNetwork:
    """Swap units inside each block so that the removed set costs less; the number of units per block stays.

    Args:
        sub: the sub-network to start from.
        gradients: per block (samples, units), from `fisher_scores` or `combine_gradients`.
        sweeps: passes over the kept units.

    Returns:
        A sub-network with cost(S) = ||Σ_{i∈S} g_i||² in no block higher than before.
    """
    for what, masks, matrices in (("heads", sub.heads, gradients.heads), ("neurons", sub.neurons, gradients.neurons)):
        if [len(m) for m in masks] != [g.shape[1] for g in matrices]:
            raise SecateurError(f"The gradients of {what} do not fit the sub-network: score the same model.")
    return SubNetwork(
        tuple(rearrange_block(m, g, sweeps) for m, g in zip(sub.heads, gradients.heads, strict=True)),
        tuple(rearrange_block(m, g, sweeps) for m, g in zip(sub.neurons, gradients.neurons, strict=True)),
    )


def rearrange_block(mask: Mask, gradients: Tensor, sweeps: int = 1) -> Mask:
    """One block: each kept unit, least important first, joins the removed set, then its most harmful member leaves.

    With K = GᵀG and c = K·1_S, removing k from S changes cost(S) = 1_SᵀK1_S by K_kk - 2c_k, so that a step costs
    O(units).
    """
    removed = ~np.array(mask, dtype=bool)
    if not removed.any() or removed.all():
        return mask
    G = gradients.double().cpu()
    K: NDArray[np.float64] = (G.T @ G).numpy()
    diagonal = K.diagonal()
    pull = K @ removed
    staying = np.where(removed, 0.0, np.inf)  # what a unit outside S would have to pay to leave it
    for _ in range(sweeps):
        before = staying == 0
        for unit in diagonal.argsort(kind="stable"):
            if before[unit]:
                continue
            pull += K[unit]
            staying[unit] = 0.0
            leaver = (diagonal - 2 * pull + staying).argmin()
            pull -= K[leaver]
            staying[leaver] = np.inf
        if np.array_equal(staying == 0, before):
            break
    return tuple(bool(v) for v in staying != 0)


def removal_cost(mask: Mask, gradients: Tensor) -> float:
    """cost(S) = ||Σ_{i∈S} g_i||² of the removed set S."""
    removed = ~torch.tensor(mask, dtype=torch.bool)
    return float(gradients.double()[:, removed].sum(1).square().sum())


# --- least squares: pure functions of second moments ----------------------------------------------


@dataclass
class Moments:
    """Sums over tokens t that determine a block's least-squares problem z_t W ≈ y_t.

    Attributes:
        count: number of tokens.
        zz: Σ z zᵀ, (inputs, inputs).
        zy: Σ z yᵀ, (inputs, hidden).
        z: Σ z, (inputs,).
        y: Σ y, (hidden,).
    """

    count: int
    zz: Tensor
    zy: Tensor
    z: Tensor
    y: Tensor

    @classmethod
    def empty(cls, inputs: int, hidden: int) -> Moments:
        return cls(
            0, *(torch.zeros(s, dtype=torch.float64) for s in ((inputs, inputs), (inputs, hidden), inputs, hidden))
        )

    def add(self, z: Tensor, y: Tensor) -> None:
        """Add rows z (tokens, inputs) and y (tokens, hidden)."""
        self.count += len(z)
        self.zz += (z.T @ z).double().cpu()
        self.zy += (z.T @ y).double().cpu()
        self.z += z.double().sum(0).cpu()
        self.y += y.double().sum(0).cpu()


def solve_scales(
    moments: Moments, weight: Tensor, width: int, *, damping: float = 1.0, intercept: bool = False
) -> Tensor:
    """One scale per unit: argmin_m Σ_t ||Σ_u m_u W_u z_tu - y_t||² + damping·||m - 1||².

    Solved for δ = m - 1 from (AᵀA + damping·I) δ = Aᵀb - AᵀA·1 by Cholesky in float64: the normal matrix is small, so
    that a direct solve is exact where an iterative one (LSMR on AᵀA, in the published code) has to be stopped.

    Args:
        moments: of the unscaled problem; `y` without the projection's bias.
        weight: W, (hidden, units × width).
        width: inputs per unit.
        damping: pulls towards one, in the units of AᵀA (summed over tokens).
        intercept: fit one more number, added to every output, and discard it.

    Returns:
        (units,) in float64.
    """
    W = weight.double().cpu()
    units = W.shape[1] // width
    A = ((W.T @ W) * moments.zz).view(units, width, units, width).sum((1, 3))
    b = (W * moments.zy.T).sum(0).view(units, width).sum(1)
    right = b - A.sum(1)
    if intercept:
        total = (W.sum(0) * moments.z).view(units, width).sum(1)
        corner = torch.tensor([[float(moments.count * W.shape[0])]], dtype=torch.float64)
        A = torch.cat((torch.cat((A, total[:, None]), 1), torch.cat((total[None], corner), 1)))
        right = torch.cat((right, (moments.y.sum() - total.sum())[None]))
    return 1 + _ridge_solve(A, right[:, None], damping)[:units, 0]


def solve_projection(
    moments: Moments, weight: Tensor, bias: Tensor | None, *, ridge: float
) -> tuple[Tensor, Tensor | None]:
    """The whole output projection: argmin Σ_t ||W' z_t + b' - y_t||² + λ||W' - W||², λ = ridge × mean of diag(Σ z zᵀ).

    With a bias, z and y are centred first and b' = mean(y) - W' mean(z); `y` includes the bias.

    Returns:
        (W', b') in float64; b' is None if the projection has no bias.
    """
    W = weight.double().cpu()
    n = max(moments.count, 1)
    zz, zy = moments.zz, moments.zy
    if bias is not None:
        zz = zz - torch.outer(moments.z, moments.z) / n
        zy = zy - torch.outer(moments.z, moments.y) / n
    if len(zz):
        strength = ridge * float(zz.diagonal().mean().clamp_min(1e-12))
        W = W + _ridge_solve(zz, zy - zz @ W.T, strength).T
    return W, None if bias is None else (moments.y - W @ moments.z) / n


def _ridge_solve(matrix: Tensor, right: Tensor, strength: float) -> Tensor:
    """(M + strength·I)⁻¹ r for a positive semi-definite M; NaN if it is too ill-conditioned even so."""
    factor, failed = torch.linalg.cholesky_ex(matrix + strength * torch.eye(len(matrix), dtype=matrix.dtype))
    return torch.cholesky_solve(right, factor) if int(failed) == 0 else torch.full_like(right, torch.nan)


# --- tuning ---------------------------------------------------------------------------------------


@dataclass
class Correction:
    """What replaces a block's output projection.

    Attributes:
        scales: factor of each unit, (units,), 0 where it is removed.
        weight: new weight (hidden, units × width), before scaling; None keeps the old one.
        bias: new bias (hidden,); None keeps the old one.
    """

    scales: Tensor
    weight: Tensor | None = None
    bias: Tensor | None = None


@dataclass
class Tuning:
    """Corrections of all blocks, in the order of `families.sites(model)`.

    Attributes:
        stopped_at: the block at which tuning stopped because its solution was not sane; "" if it went through. That
            block and the later ones keep their weights.
    """

    heads: list[Correction] = field(default_factory=list)
    neurons: list[Correction] = field(default_factory=list)
    stopped_at: str = ""


def tune(
    model: nn.Module,
    sub: SubNetwork,
    batches: Batches,
    *,
    mode: Literal["scale", "full"] = "scale",
    teacher: SubNetwork | None = None,
    damping: float = 1.0,
    ridge: float = 0.01,
    read_rows: bool = True,
    progress: bool = False,
) -> Tuning:
    """Least-squares tuning of a sub-network's output projections, layer by layer, without labels.

    Each block's target is the teacher's residual stream after the block, minus what the already tuned student brings in
    itself: y = (teacher block output + teacher residual input) - student residual input. Rows are real tokens.

    Args:
        model: the unsliced model; it is not changed.
        sub: what is kept.
        batches: model inputs; labels are ignored.
        mode: `"scale"` finds one factor per kept head and neuron (the published method), `"full"` the whole kept part
            of the output projection and its bias.
        teacher: a larger sub-network as teacher; by default the dense model.
        damping: of `solve_scales`.
        ridge: of `solve_projection`.
        read_rows: in the last layer fit only the tokens that the output reads (the first one, for most classifiers).
        progress: show a progress line.

    Returns:
        The corrections, to be written by `fold_scales`.
    """
    if next(model.parameters()).dtype not in (torch.float32, torch.float64):
        model = nn.Module.float(copy.deepcopy(model))  # transformers refuses its own `float` here
    found = sites(model)
    sub.check_fits(found)
    plan = plain(sub)
    student = copy.deepcopy(model)
    fold_scales(student, plan)
    if teacher is not None:
        model = copy.deepcopy(model)
        fold_scales(model, plain(teacher))
    solver = _Solver(found, sub, mode, damping, ridge)
    with torch.no_grad(), quiet(model), quiet(student):
        runs = BlockRuns(model, student, batches, read_rows)
        for layer in track(layers(found), "tuning", show=progress):
            if not _tune_layer(runs, solver, layer, plan):
                break
    return plan


def _tune_layer(runs: BlockRuns, solver: _Solver, layer: Layer, plan: Tuning) -> bool:
    """Tune the blocks of one layer; False if a solution was not sane, which ends the tuning."""
    runs.enter(layer)
    for kind, index in (*(("heads", h) for h in layer.heads), ("neurons", layer.neurons)):
        site: Site = getattr(runs.student, kind)[index]
        corrections = plan.heads if kind == "heads" else plan.neurons
        if site.units == 0:
            continue
        solved = solver.solve(runs, layer, site, getattr(solver.sub, kind)[index])
        if solved is None:
            plan.stopped_at = site.name
            return False
        corrections[index] = solved
        _write(site, solved)
    runs.leave(layer)
    return True


@dataclass
class _Solver:
    found: Sites
    sub: SubNetwork
    mode: str
    damping: float
    ridge: float

    def solve(self, runs: BlockRuns, layer: Layer, site: Site, mask: Mask) -> Correction | None:
        """The correction of one block, None if it is not sane."""
        kept = torch.tensor(mask, dtype=torch.bool)
        columns = kept.repeat_interleave(site.width)
        weight = output_weight(site)
        bias = getattr(site.output, "bias", None)
        moments = Moments.empty(int(columns.sum()), weight.shape[0])
        offset = bias if bias is not None and self.mode == "scale" else 0.0
        for z, y in runs.rows(layer, site):
            moments.add(z[:, columns], y - offset)
        scales = kept.double()
        if self.mode == "scale":
            if not kept.any():
                return Correction(scales)
            heads = site.kind == "heads"
            found = solve_scales(moments, weight[:, columns], site.width, damping=self.damping, intercept=heads)
            scales[kept] = found
            return Correction(scales) if bool((found.abs() <= SANE).all()) else None
        new, new_bias = solve_projection(moments, weight[:, columns], bias, ridge=self.ridge)
        whole = torch.zeros(weight.shape, dtype=torch.float64)
        whole[:, columns] = new
        return Correction(scales, whole, new_bias) if bool(whole.isfinite().all()) else None


def plain(sub: SubNetwork) -> Tuning:
    """Corrections that only close the removed units."""
    heads, neurons = sub.masks(torch.float64)
    return Tuning([Correction(m) for m in heads], [Correction(m) for m in neurons])


def fold_scales(model: nn.Module, tuning: Tuning) -> None:
    """Write corrections into the output projections, in place: kept units are tuned, removed ones contribute nothing.

    Slicing the removed units away afterwards does not change the model any further.

    Raises:
        SecateurError: the tuning belongs to a model of other widths.
    """
    found = sites(model)
    corrections = (*tuning.heads, *tuning.neurons)
    blocks: Sequence[Site] = tuple(found)
    if [s.units for s in blocks] != [len(c.scales) for c in corrections]:
        raise SecateurError("The tuning does not fit the model: fold it into the unsliced model that was tuned.")
    for site, correction in zip(blocks, corrections, strict=True):
        _write(site, correction)


def _write(site: Site, correction: Correction) -> None:
    old = output_weight(site)
    new = old if correction.weight is None else correction.weight.to(old)
    new = new * correction.scales.to(old).repeat_interleave(site.width)
    with torch.no_grad():
        weight: Tensor = site.output.weight  # type: ignore[assignment]
        weight.copy_(new if axis(site.output, "out") == 0 else new.T)
        if correction.bias is not None:
            bias: Tensor = site.output.bias  # type: ignore[assignment]
            bias.copy_(correction.bias.to(bias))
