"""Sort heads and neurons by importance, so that the first ones of a block are the best ones of that number."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.bits.modules import is_binary
from secateur.errors import SecateurError
from secateur.families import Site, axis, sites, weight_of
from secateur.quirks import shorten, unit_index
from secateur.subnetwork import UnitScores


@torch.no_grad()
def sort_units(model: nn.Module, scores: UnitScores) -> UnitScores:
    """Put the units of every block in the order of falling scores, in place; equal scores keep their order.

    A permutation of weights: what the model computes stays as it is, but for the order of sums. Heads stay where they
    are in families whose layers share a position bias with a row for each head (T5, MPNet).

    Args:
        model: a model of a known family.
        scores: importance of every unit, more is better.

    Returns:
        The scores in the order that the units have now.

    Raises:
        SecateurError: the scores do not fit the model or are not finite, or the model is binary.
    """
    if is_binary(model):
        raise SecateurError("A binary model cannot be sorted: sort it first, and binarize it last.")
    found = sites(model)
    if len(scores.heads) != len(found.heads) or len(scores.neurons) != len(found.neurons):
        raise SecateurError("The scores are those of another model: it has another number of blocks.")
    for site, values in zip(found, (*scores.heads, *scores.neurons), strict=True):
        _check(site, values)
    after: list[Tensor] = []
    for site, values in zip(found, (*scores.heads, *scores.neurons), strict=True):
        stays = site.kind == "heads" and found.family.quirk
        order = list(range(site.units)) if stays else values.argsort(descending=True, stable=True).tolist()
        after.append(values[order])
        if order == sorted(order):
            continue
        for module, cut in site.cuts:
            dimension = axis(module, cut.side)
            index = unit_index(order, site.units, weight_of(module).shape[dimension], cut.parts)
            shorten(module, dimension, index, bias=cut.side == "out")
    return UnitScores(after[: len(found.heads)], after[len(found.heads) :])


def _check(site: Site, values: Tensor) -> None:
    if len(values) != site.units:
        raise SecateurError(f"There are {len(values)} scores for the {site.units} {site.kind} of '{site.name}'.")
    if not bool(values.isfinite().all()):
        raise SecateurError(f"A score of '{site.name}' is not finite.")
