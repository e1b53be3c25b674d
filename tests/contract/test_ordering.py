"""Contract of sorting: no family computes anything else, and the first units are the best ones."""

from __future__ import annotations

import copy

import pytest
import torch

from secateur.binary import binarize
from secateur.edits import Slice
from secateur.errors import SecateurError
from secateur.families import sites
from secateur.ordering import sort_units
from secateur.subnetwork import SubNetwork, UnitScores
from tests.conftest import tiny_batch, tiny_model
from tests.contract.test_families import logits


def random_scores(model: torch.nn.Module) -> UnitScores:
    generator = torch.Generator().manual_seed(3)
    found = sites(model)
    draws = [torch.rand(site.units, generator=generator) for site in found]
    return UnitScores(draws[: len(found.heads)], draws[len(found.heads) :])


def test_a_sorted_model_computes_the_same(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    before, old = logits(model, batch), {name: p.clone() for name, p in model.named_parameters()}
    sort_units(model, random_scores(model))
    assert torch.allclose(logits(model, batch), before, atol=1e-5)
    moved = [name for name, p in model.named_parameters() if not torch.equal(p, old[name])]
    assert len(moved) >= len(sites(model).neurons)
    assert {name: p.shape for name, p in model.named_parameters()} == {name: p.shape for name, p in old.items()}


def test_the_first_units_are_the_best_ones(family: str) -> None:
    """Slicing a sorted model to a prefix is slicing the model to its best units."""
    model, batch = tiny_model(family), tiny_batch(family)
    scores, found = random_scores(model), sites(model)
    heads = 4 if found.family.quirk else 2

    def best(values: torch.Tensor, count: int) -> torch.Tensor:
        return values.argsort(descending=True).argsort() < count

    wanted = copy.deepcopy(model)
    Slice(
        SubNetwork.from_masks(
            [best(values, heads) for values in scores.heads], [best(values, 7) for values in scores.neurons]
        )
    ).apply(wanted)
    sort_units(model, scores)
    Slice(
        SubNetwork.from_masks(
            [torch.arange(len(values)) < heads for values in scores.heads],
            [torch.arange(len(values)) < 7 for values in scores.neurons],
        )
    ).apply(model)
    assert torch.allclose(logits(model, batch), logits(wanted, batch), atol=1e-5)


def test_by_hand() -> None:
    model = tiny_model("bert")
    site = sites(model).neurons[0]
    up, down = (module.weight.detach().clone() for module, _ in site.cuts)  # type: ignore[operator]
    scores = UnitScores([torch.ones(4)] * 3, [torch.arange(48.0), torch.ones(48), torch.ones(48)])
    after = sort_units(model, scores)
    assert torch.equal(after.neurons[0], torch.arange(48.0).flip(0))
    assert torch.equal(site.cuts[0][0].weight, up.flip(0))  # type: ignore[arg-type]
    assert torch.equal(site.cuts[1][0].weight, down.flip(1))  # type: ignore[arg-type]


def test_what_does_not_fit_is_refused() -> None:
    model = tiny_model("bert")
    scores = random_scores(model)
    with pytest.raises(SecateurError, match="another number of blocks"):
        sort_units(model, UnitScores(scores.heads[:2], scores.neurons))
    with pytest.raises(SecateurError, match="3 scores for the 4 heads of 'encoder.layer.0.attention.self'"):
        sort_units(model, UnitScores([torch.ones(3), *scores.heads[1:]], scores.neurons))
    with pytest.raises(SecateurError, match="is not finite"):
        sort_units(model, UnitScores([torch.full((4,), torch.nan), *scores.heads[1:]], scores.neurons))
    binarize(model, [tiny_batch("bert")])  # type: ignore[arg-type]
    with pytest.raises(SecateurError, match="sort it first"):
        sort_units(model, scores)
