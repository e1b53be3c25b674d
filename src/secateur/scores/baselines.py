"""Simple importances that any better one has to beat: chance, weight magnitude, size of a unit's own contribution."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from secateur.families import Site, Sites, axis, output_weight, sites
from secateur.progress import track
from secateur.scores.observe import Batches, inputs_of, quiet, recorded_inputs, token_mask
from secateur.subnetwork import UnitScores


def random_scores(model: nn.Module, seed: int = 0) -> UnitScores:
    """Uniform numbers in [0, 1)."""
    generator = torch.Generator().manual_seed(seed)
    return _scores(sites(model), [torch.rand(site.units, generator=generator) for site in sites(model)])


def magnitude_scores(model: nn.Module) -> UnitScores:
    """L2 norm of all weights that go when the unit goes (every cut, biases left out)."""
    found = sites(model)
    return _scores(found, [_magnitude(site) for site in found])


def local_scores(model: nn.Module, batches: Batches, *, progress: bool = False) -> UnitScores:
    """Mean over tokens of the squared length of the unit's own contribution to the block's output.

    For a neuron z_j² ||w_j||², for a head ||ctx_h W_O[h]||², exactly. One forward pass per batch; padding is left out.
    """
    found = sites(model)
    blocks = list(found)
    moments = [torch.zeros(s.units, s.width, s.width, dtype=torch.float64) for s in blocks]
    counts = [0] * len(blocks)
    with torch.inference_mode(), quiet(model):
        for batch in track(batches, "local scores", show=progress):
            inputs = inputs_of(model, batch)
            with recorded_inputs([site.output for site in blocks]) as seen:
                model(**inputs)
            for block, (site, x) in enumerate(zip(blocks, seen, strict=True)):
                if x is None or site.units == 0:
                    continue
                rows = x[token_mask(inputs, site.stack, x)].unflatten(-1, (site.units, site.width)).float()
                moments[block] += torch.einsum("tua,tub->uab", rows, rows).double().cpu()
                counts[block] += len(rows)
    return _scores(found, [_local(s, m / max(n, 1)) for s, m, n in zip(blocks, moments, counts, strict=True)])


def _local(site: Site, moment: Tensor) -> Tensor:
    """tr(W_u M_u W_uᵀ) for every unit u, with M_u the second moment of its activations."""
    weight = output_weight(site).detach().double().cpu().unflatten(-1, (site.units, site.width))
    return torch.einsum("hua,hub,uab->u", weight, weight, moment).float()


def _magnitude(site: Site) -> Tensor:
    total = torch.zeros(site.units, dtype=torch.float64)
    for module, cut in site.cuts:
        weight: Tensor = module.weight.detach().double().cpu()  # type: ignore[operator]
        rows = weight.movedim(axis(module, cut.side), 0).reshape(cut.parts, site.units, -1)
        total += rows.square().sum((0, 2))
    return total.sqrt().float()


def _scores(found: Sites, values: list[Tensor]) -> UnitScores:
    return UnitScores(values[: len(found.heads)], values[len(found.heads) :])
