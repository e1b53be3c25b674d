from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from secateur.families import Sites, sites
from secateur.gates import gates
from secateur.scores.exact import exact_scores
from secateur.scores.observe import (
    layers,
    output_divergence,
    quiet,
    read_output,
    recorded,
    sample,
    token_mask,
)
from secateur.scores.trajectory import TrajectoryScores, cosine_gram
from secateur.subnetwork import SubNetwork, UnitScores
from tests.conftest import tiny_batch, tiny_model

SMALL = {
    "distilbert": dict(n_layers=2, hidden_dim=6),
    "dinov2": dict(num_hidden_layers=2, mlp_ratio=1),
    "gpt2": dict(n_layer=2, n_inner=6),
    "bart": dict(encoder_ffn_dim=5, decoder_ffn_dim=5),
    "t5-gated": dict(d_ff=5),
}


def double(family: str, **overrides: object) -> tuple[nn.Module, dict[str, Tensor]]:
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(family).items()}
    return tiny_model(family, **overrides).double(), batch


def flat(scores: UnitScores) -> Tensor:
    return torch.cat([*scores.heads, *scores.neurons])


def by_masking(model: nn.Module, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The definition: the whole network with one mask entry at zero, against the intact network."""
    found = sites(model)
    stack = layers(found)
    inputs = sample(model, batch, 768, seed=0)
    bent, moved = [], []
    with torch.no_grad(), quiet(model), recorded([layer.tap for layer in stack]) as seen:
        teacher_output = read_output(model(**inputs), inputs, stack[-1].stack)
        teacher = list(seen)
        for block, unit, layer in _units(found):
            masks = [torch.ones(site.units, dtype=torch.float64) for site in found]
            masks[block][unit] = 0
            with gates(found, masks[: len(found.heads)], masks[len(found.heads) :]):
                output = read_output(model(**inputs), inputs, stack[-1].stack)
            later = [z for z in range(len(stack)) if z > layer] or [len(stack) - 1]
            distance = 0.0
            for z in later:
                real = token_mask(inputs, stack[z].stack, teacher[z])
                before, after = cosine_gram(teacher[z][real]), cosine_gram(seen[z][real])
                distance += float((before - after).square().sum() / before.square().sum())
            bent.append(distance)
            moved.append(float(output_divergence(teacher_output, output.values[None], 4.0)))
    return torch.tensor(bent, dtype=torch.float64), torch.tensor(moved, dtype=torch.float64)


def _units(found: Sites) -> list[tuple[int, int, int]]:
    """(block, unit, index of its layer over all stacks)."""
    owner = {}
    for layer in layers(found):
        for block in (*layer.heads, len(found.heads) + layer.neurons):
            owner[block] = layer.index
    return [(b, u, owner[b]) for b, site in enumerate(found) for u in range(site.units)]


@pytest.mark.parametrize(
    "name",
    ["bert", "distilbert", "mpnet", "deberta-v2", "modernbert", "vit", "dinov2", "gpt2", "llama", "bart", "t5-gated"],
)
def test_replay_equals_masking(name: str) -> None:
    model, batch = double(name, **SMALL.get(name, dict(num_hidden_layers=2, intermediate_size=6)))
    bent, moved = by_masking(model, batch)
    fast = exact_scores(model, [batch], variants=4)
    assert torch.allclose(flat(fast.trajectory), bent, rtol=1e-6, atol=1e-18)
    assert torch.allclose(flat(fast.output), moved, rtol=1e-6, atol=1e-18)


def test_units_without_effect_score_zero() -> None:
    model, batch = double("bert")
    found = sites(model)
    with torch.no_grad():
        found.neurons[0].output.weight[:, 5] = 0
        found.heads[1].output.weight[:, 8:16] = 0
    scores = exact_scores(model, [batch])
    assert float(scores.trajectory.neurons[0][5]) == 0.0
    assert float(scores.trajectory.heads[1][1]) == 0.0
    assert float(scores.output.neurons[0][5]) < 1e-14
    others = torch.cat((scores.trajectory.neurons[0][:5], scores.trajectory.neurons[0][6:]))
    assert float(others.min()) > 0
    assert float(flat(scores.output).min()) >= 0


def test_permuting_units_permutes_scores() -> None:
    model, batch = double("bert")
    permuted = copy.deepcopy(model)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    heads = torch.tensor([2, 0, 3, 1])
    rows = (heads[:, None] * 8 + torch.arange(8)).flatten()
    layer = permuted.bert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight.copy_(layer.intermediate.dense.weight[order])
        layer.intermediate.dense.bias.copy_(layer.intermediate.dense.bias[order])
        layer.output.dense.weight.copy_(layer.output.dense.weight[:, order])
        for part in (layer.attention.self.query, layer.attention.self.key, layer.attention.self.value):
            part.weight.copy_(part.weight[rows])
            part.bias.copy_(part.bias[rows])
        layer.attention.output.dense.weight.copy_(layer.attention.output.dense.weight[:, rows])
    a, b = exact_scores(model, [batch]), exact_scores(permuted, [batch])
    assert torch.allclose(a.trajectory.neurons[1][order], b.trajectory.neurons[1], rtol=1e-9)
    assert torch.allclose(a.trajectory.heads[1][heads], b.trajectory.heads[1], rtol=1e-9)
    assert torch.allclose(a.trajectory.neurons[0], b.trajectory.neurons[0], rtol=1e-9)


def test_scores_do_not_depend_on_what_else_is_scored() -> None:
    model, batch = double("bert")
    found = sites(model)
    everything = exact_scores(model, [batch], variants=4)
    generator = torch.Generator().manual_seed(0)
    some = SubNetwork.from_masks(
        [torch.rand(s.units, generator=generator) < 0.5 for s in found.heads],
        [torch.rand(s.units, generator=generator) < 0.2 for s in found.neurons],
    )
    part = exact_scores(model, [batch], units=some, variants=9)
    heads, neurons = some.masks()
    chosen = torch.cat([*heads, *neurons]).bool()
    assert torch.allclose(flat(part.trajectory)[chosen], flat(everything.trajectory)[chosen], rtol=1e-9)
    assert bool(flat(part.trajectory)[~chosen].isnan().all())


def test_padding_does_not_count() -> None:
    model, batch = double("bert")
    padded = {name: nn.functional.pad(value, (0, 4)) for name, value in batch.items()}
    plain, more = exact_scores(model, [batch]), exact_scores(model, [padded])
    assert torch.allclose(flat(plain.trajectory), flat(more.trajectory), rtol=1e-6)
    # content of padding positions inside the longest sequence does not count either
    filled = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7))
    assert torch.allclose(flat(plain.trajectory), flat(exact_scores(model, [filled]).trajectory), rtol=1e-6)


def test_own_layer_adds_a_term() -> None:
    model, batch = double("bert")
    later, own = exact_scores(model, [batch]), exact_scores(model, [batch], own_layer=True)
    assert bool((own.trajectory.neurons[0] > later.trajectory.neurons[0]).all())
    assert torch.equal(own.trajectory.neurons[-1], later.trajectory.neurons[-1])


def test_mean_over_batches() -> None:
    model, batch = double("bert")
    other = {key: value[1:] for key, value in batch.items()}
    both = exact_scores(model, [batch, other])
    expected = (flat(exact_scores(model, [batch]).trajectory) + flat(exact_scores(model, [other]).trajectory)) / 2
    assert torch.allclose(flat(both.trajectory), expected, rtol=1e-9)


def test_model_is_left_as_it_was() -> None:
    model = tiny_model("bert").train()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    exact_scores(model, [tiny_batch("bert")], tokens=9)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all("forward" not in m.__dict__ for m in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())


def test_half_precision_is_scored_in_float32() -> None:
    model = tiny_model("bert").half()
    scores: TrajectoryScores = exact_scores(model, [tiny_batch("bert")])
    expected = exact_scores(copy.deepcopy(model).float(), [tiny_batch("bert")])
    assert torch.equal(flat(scores.trajectory), flat(expected.trajectory))
    assert next(model.parameters()).dtype == torch.float16


def test_sample_takes_whole_sequences() -> None:
    model = tiny_model("bert")
    batch = tiny_batch("bert", batch=8)
    picked = sample(model, batch, tokens=20, seed=3)
    assert picked["attention_mask"].sum() <= 20
    assert len(picked["input_ids"]) == 2
    again = sample(model, batch, tokens=20, seed=3)
    assert torch.equal(picked["input_ids"], again["input_ids"])
    assert len(sample(model, batch, tokens=1, seed=3)["input_ids"]) == 1
    # an image of 32 × 32 has 16 patches and a class token
    images = tiny_batch("vit", batch=5)
    assert len(sample(tiny_model("vit"), images, tokens=34, seed=0)["pixel_values"]) == 2
