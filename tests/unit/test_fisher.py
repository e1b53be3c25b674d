from __future__ import annotations

import pytest
import torch

from secateur.errors import InvalidData
from secateur.families import sites
from secateur.gates import gates
from secateur.scores.fisher import fisher_scores
from tests.conftest import tiny_batch, tiny_model


def labelled(seed: int) -> dict[str, torch.Tensor]:
    return tiny_batch("bert", seed=seed) | {"labels": torch.tensor([0, 1, 1])}


def test_scores_are_the_summed_squares_of_batch_gradients() -> None:
    model = tiny_model("bert")
    scores, gradients = fisher_scores(model, [labelled(1), labelled(2)])
    assert gradients.neurons[0].shape == (2, 48)
    assert gradients.heads[2].shape == (2, 4)
    for values, rows in zip((*scores.heads, *scores.neurons), (*gradients.heads, *gradients.neurons), strict=True):
        assert torch.allclose(values, rows[0] ** 2 + rows[1] ** 2)


def test_gradients_are_slopes_of_the_mean_loss() -> None:
    model, batch = tiny_model("bert").double(), labelled(1)
    found = sites(model)
    _, gradients = fisher_scores(model, [batch])
    for block, unit in ((0, 1), (2, 3)):
        losses = []
        for step in (1e-5, -1e-5):
            masks = [torch.ones(s.units, dtype=torch.float64) for s in found.heads]
            masks[block][unit] += step
            with torch.no_grad(), gates(model, heads=masks):
                losses.append(float(model(**batch).loss))
        assert float(gradients.heads[block][0, unit]) == pytest.approx((losses[0] - losses[1]) / 2e-5, rel=1e-4)


def test_needs_labels() -> None:
    with pytest.raises(InvalidData, match="labelled"):
        fisher_scores(tiny_model("bert"), [tiny_batch("bert")])
    with pytest.raises(InvalidData, match="one batch"):
        fisher_scores(tiny_model("bert"), [])


def test_model_is_left_as_it_was() -> None:
    model = tiny_model("bert").train()
    fisher_scores(model, [labelled(1)])
    assert model.training
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
