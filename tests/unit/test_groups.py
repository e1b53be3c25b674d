"""Heads and neurons as groups of weights, by hand and on every family."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import secateur
from secateur.edits.slice import nonzero_units
from secateur.errors import SecateurError
from secateur.families import sites
from secateur.sparsity.groups import MatrixGroups, UnitGroups, groups_of, kinds_of
from secateur.sparsity.selection import pattern_of
from secateur.sparsity.weights import prunable, sparsity
from tests.conftest import tiny_batch, tiny_model

LAYER = "encoder.layer.0."


def one_layer(**sizes: int) -> Any:
    """A BERT of one layer: hidden 4, two heads of width 2, three neurons, all weights 1."""
    model: Any = tiny_model(
        "bert",
        **{**dict(num_hidden_layers=1, hidden_size=4, num_attention_heads=2, intermediate_size=3), **sizes},
    )
    for weight in prunable(model).values():
        weight.data.fill_(1)
    return model


def test_units_by_hand() -> None:
    model = one_layer()
    weights = prunable(model)
    weights[LAYER + "intermediate.dense.weight"].data[1] = 3  # (neurons, hidden)
    weights[LAYER + "output.dense.weight"].data[:, 2] = 0  # (hidden, neurons)
    weights[LAYER + "attention.self.key.weight"].data[2:] = 2  # the second head
    groups = UnitGroups(model, weights)
    assert (groups.units, groups.sizes, groups.largest) == ([2, 3], [32, 8], 32)
    assert groups.size(LAYER + "attention.self.query.weight") == 32
    squares = groups.squares(weights)
    assert squares(LAYER + "attention.self.query.weight").tolist() == [[32], [32], [56], [56]]  # type: ignore[union-attr]
    assert squares(LAYER + "attention.output.dense.weight").tolist() == [32, 32, 56, 56]  # type: ignore[union-attr]
    assert squares(LAYER + "intermediate.dense.weight").tolist() == [[8], [40], [4]]  # type: ignore[union-attr]
    # root mean squares: heads 1 and 1.32, neurons 1, 2.24 and 0.71; of 88 weights 8 go with the lowest
    masks = groups.choose(weights, 0.09, 0.0)
    assert [int((~mask).sum()) for mask in masks.values()] == [0, 0, 0, 0, 4, 4]
    assert masks[LAYER + "output.dense.weight"][0].tolist() == [True, True, False]
    masks = groups.choose(weights, 0.1, 0.0)  # 8.8 weights: one head more, since it comes first
    assert sparsity(masks) == pytest.approx(40 / 88)
    assert masks[LAYER + "attention.self.value.weight"][:, 0].tolist() == [False, False, True, True]
    masks = groups.choose(weights, 0.9, 0.5)  # half the heads stay, and of three neurons one
    assert masks[LAYER + "attention.self.value.weight"][:, 0].tolist() == [False, False, True, True]
    assert masks[LAYER + "intermediate.dense.weight"][:, 0].tolist() == [False, True, False]


def test_scores_keep_their_sign() -> None:
    model = one_layer()
    scores = {name: torch.ones_like(weight) for name, weight in prunable(model).items()}
    scores[LAYER + "intermediate.dense.weight"][0] = -5
    mask = UnitGroups(model, prunable(model)).choose(scores, 0.01, 0.0)[LAYER + "intermediate.dense.weight"]
    assert mask[:, 0].tolist() == [False, True, True]


@pytest.mark.parametrize("pattern", ["heads", "neurons", "units"])
def test_zero_units_can_be_cut_out_of_every_family(family: str, pattern: str) -> None:
    model: Any = tiny_model(family)
    weights = prunable(model, None, kinds_of(pattern_of(pattern)))
    groups = groups_of(model, weights, pattern_of(pattern))
    masks = groups.choose({name: weight.detach().abs() for name, weight in weights.items()}, 0.5, 0.0)
    assert masks.keys() == weights.keys()
    assert all(mask.shape == weights[name].shape for name, mask in masks.items())
    largest = groups.largest / sum(weight.numel() for weight in weights.values())
    assert 0.5 <= sparsity(masks) <= 0.5 + largest
    for name, weight in weights.items():
        weight.data.mul_(masks[name])
    batch = tiny_batch(family)
    with torch.inference_mode():
        masked = model(**batch)[0]
        units = nonzero_units(model)
        secateur.slice_zeros(model)
        torch.testing.assert_close(model(**batch)[0], masked, rtol=1e-4, atol=1e-5)
    found = sites(model)
    assert [site.units for site in found.heads] == list(units.head_widths)
    assert [site.units for site in found.neurons] == list(units.neuron_widths)
    assert sum(weight.numel() for weight in prunable(model, None, kinds_of(pattern_of(pattern))).values()) == sum(
        int(mask.sum()) for mask in masks.values()
    )


def test_half_precision_is_ranked_as_float32() -> None:
    model: Any = tiny_model("bert")
    scores = {name: weight.detach().bfloat16() for name, weight in prunable(model).items()}
    groups = UnitGroups(model, prunable(model))
    wide = groups.choose({name: score.float() for name, score in scores.items()}, 0.5, 0.0)
    narrow = groups.choose(scores, 0.5, 0.0)
    assert all(torch.equal(mask, wide[name]) for name, mask in narrow.items())


def test_matrices_of_conv1d_are_turned() -> None:
    model: Any = tiny_model("gpt2")
    weights = prunable(model, "mlp.c_fc")
    groups = MatrixGroups(model, weights, pattern_of("4x1"))  # type: ignore[arg-type]
    name, weight = next(iter(weights.items()))  # (in, out)
    found = groups.squares(weights)(name)
    assert found is not None
    assert found.shape == weight.shape
    torch.testing.assert_close(found[0, :4], weight[0, :4].square().sum().expand(4))


def test_bad_input() -> None:
    model = one_layer()
    with pytest.raises(SecateurError, match="not all maps"):
        groups_of(model, prunable(model, "query|intermediate|layer.0.output"), pattern_of("units"))
    groups, scores = UnitGroups(model, prunable(model)), {n: torch.ones_like(w) for n, w in prunable(model).items()}
    scores[LAYER + "intermediate.dense.weight"][0] = torch.nan
    with pytest.raises(SecateurError, match="not a finite number"):
        groups.choose(scores, 0.5, 0.0)
    with pytest.raises(SecateurError, match="cannot be divided into 3x3"):
        groups_of(model, prunable(model), pattern_of("3x3"))
    with pytest.raises(SecateurError, match="No head or neuron"):
        secateur.slice_zeros(model)
