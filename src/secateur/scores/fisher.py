"""Diagonal Fisher information of the mask gradients (Kwon et al., NeurIPS 2022): importance from labelled data."""

from __future__ import annotations

import torch
from torch import nn

from secateur.errors import InvalidData
from secateur.families import sites
from secateur.gates import gates
from secateur.progress import track
from secateur.scores.observe import LABELS, Batches, quiet
from secateur.scores.trajectory import UnitGradients
from secateur.subnetwork import UnitScores


def fisher_scores(model: nn.Module, batches: Batches, *, progress: bool = False) -> tuple[UnitScores, UnitGradients]:
    """I_j = Σ_b g_b[j]², with g_b the gradient of the mean task loss of mini-batch b with respect to mask j at one.

    Near an optimum the loss increase of removing units is about half the sum of their I. The published method squares
    mini-batch gradients (64 batches of 32 examples), not those of single examples.

    Args:
        model: a model with a task head that returns a loss when it is given labels.
        batches: model inputs with labels.
        progress: show a progress line.

    Returns:
        The scores, and the gradients behind them: per block (batches, units).

    Raises:
        InvalidData: a batch has no labels, or the model returns no loss for it.
    """
    found = sites(model)
    device = next(model.parameters()).device
    dtype = next(model.parameters()).dtype
    count = len(found.heads)
    rows: list[list[torch.Tensor]] = [[] for _ in found]
    with quiet(model):
        for batch in track(batches, "Fisher information", show=progress):
            masks = [torch.ones(site.units, device=device, dtype=dtype, requires_grad=True) for site in found]
            with gates(found, masks[:count], masks[count:]):
                loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
            if loss is None:
                raise InvalidData(
                    f"Fisher scores need labelled batches: none of {', '.join(LABELS[:2])} is in {sorted(batch)}."
                )
            grads = torch.autograd.grad(loss, masks, allow_unused=True)
            for block, (mask, grad) in enumerate(zip(masks, grads, strict=True)):
                rows[block].append((torch.zeros_like(mask) if grad is None else grad).float().cpu())
    if not batches:
        raise InvalidData("Fisher scores need at least one batch.")
    stacked = [torch.stack(r) for r in rows]
    gradients = UnitGradients(stacked[:count], stacked[count:])
    return gradients.scores(), gradients
