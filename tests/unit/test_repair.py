from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import Tensor, nn

from secateur.edits import Slice, apply_edits
from secateur.errors import SecateurError
from secateur.families import sites
from secateur.gates import gates
from secateur.repair import (
    Moments,
    fold_scales,
    plain,
    rearrange,
    rearrange_block,
    removal_cost,
    solve_projection,
    solve_scales,
    tune,
)
from secateur.scores.trajectory import UnitGradients
from secateur.subnetwork import SubNetwork
from tests.conftest import tiny_batch, tiny_model


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def cut(model: nn.Module, share: float = 0.7, seed: int = 0) -> SubNetwork:
    found = sites(model)
    generator = torch.Generator().manual_seed(seed)
    return SubNetwork.from_masks(
        [torch.rand(s.units, generator=generator) < share for s in found.heads],
        [torch.rand(s.units, generator=generator) < share for s in found.neurons],
    )


def logits(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return model(**batch).logits


# --- rearrangement


def test_rearrangement_finds_the_pair_that_cancels() -> None:
    # removing units 0 and 1 costs (1 + 1)² = 4, units 0 and 2 cancel: cost 0.0625
    gradients = torch.tensor([[1.0, 1.0, -1.25, 3.0]])
    start = (False, False, True, True)
    assert removal_cost(start, gradients) == 4.0
    better = rearrange_block(start, gradients)
    assert sum(better) == 2
    assert removal_cost(better, gradients) == pytest.approx(0.0625)


@pytest.mark.parametrize("seed", range(6))
def test_rearrangement_never_costs_more_and_is_near_the_best(seed: int) -> None:
    gradients = random(4, 8, seed=seed)
    least = gradients.square().sum(0).argsort()
    mask = torch.ones(8, dtype=torch.bool)
    mask[least[:3]] = False
    start = tuple(mask.tolist())
    better = rearrange_block(start, gradients)
    options = [tuple(i not in gone for i in range(8)) for gone in itertools.combinations(range(8), 3)]
    costs = [removal_cost(option, gradients) for option in options]
    assert sum(better) == 5
    assert min(costs) - 1e-12 <= removal_cost(better, gradients) <= removal_cost(start, gradients)
    best = removal_cost(rearrange_block(start, gradients, sweeps=10), gradients)
    assert best <= removal_cost(better, gradients) + 1e-12


def test_rearrangement_keeps_the_widths_of_every_block() -> None:
    sub = SubNetwork(((True, False, True),), ((False,) * 3 + (True,) * 5, (True,) * 8, (False,) * 8))
    gradients = UnitGradients([random(6, 3)], [random(6, 8, seed=s) for s in (1, 2, 3)])
    better = rearrange(sub, gradients)
    assert better.head_widths == sub.head_widths
    assert better.neuron_widths == sub.neuron_widths
    with pytest.raises(SecateurError, match="do not fit"):
        rearrange(sub, UnitGradients([random(6, 4)], gradients.neurons))


# --- least squares


@pytest.mark.parametrize(("width", "intercept"), [(1, False), (2, False), (2, True)])
def test_scales_solve_the_least_squares_problem(width: int, intercept: bool) -> None:
    tokens, units, hidden, damping = 20, 3, 4, 0.7
    z, W, y = random(tokens, units * width), random(hidden, units * width, seed=1), random(tokens, hidden, seed=2)
    moments = Moments.empty(units * width, hidden)
    moments.add(z[:9], y[:9])
    moments.add(z[9:], y[9:])
    # one column per unit, one row per number of the output
    columns = [(z[:, u * width :][:, :width] @ W[:, u * width :][:, :width].T).flatten() for u in range(units)]
    prior = [1.0] * units
    if intercept:
        columns.append(torch.ones(tokens * hidden, dtype=torch.float64))
        prior.append(0.0)
    A, m0 = torch.stack(columns, 1), torch.tensor(prior, dtype=torch.float64)
    system = torch.cat((A, damping**0.5 * torch.eye(len(prior), dtype=torch.float64)))
    right = torch.cat((y.flatten(), damping**0.5 * m0))
    expected = torch.linalg.lstsq(system, right[:, None]).solution[:units, 0]
    assert torch.allclose(solve_scales(moments, W, width, damping=damping, intercept=intercept), expected)


def test_scales_of_units_without_data_stay_one() -> None:
    moments = Moments.empty(3, 2)
    moments.add(torch.zeros(5, 3, dtype=torch.float64), random(5, 2))
    assert torch.allclose(solve_scales(moments, random(2, 3), 1), torch.ones(3, dtype=torch.float64))


@pytest.mark.parametrize("biased", [False, True])
def test_projection_solves_the_ridge_problem(biased: bool) -> None:
    tokens, inputs, hidden = 30, 4, 3
    z, W, y = random(tokens, inputs) + 0.5, random(hidden, inputs, seed=1), random(tokens, hidden, seed=2)
    moments = Moments.empty(inputs, hidden)
    moments.add(z, y)
    new, bias = solve_projection(moments, W, torch.zeros(hidden) if biased else None, ridge=0.1)
    centred_z, centred_y = (z - z.mean(0), y - y.mean(0)) if biased else (z, y)
    strength = 0.1 * float(centred_z.square().sum(0).mean())
    system = torch.cat((centred_z, strength**0.5 * torch.eye(inputs, dtype=torch.float64)))
    expected = torch.linalg.lstsq(system, torch.cat((centred_y, strength**0.5 * W.T))).solution.T
    assert torch.allclose(new, expected)
    if biased:
        assert bias is not None
        assert torch.allclose(bias, y.mean(0) - expected @ z.mean(0))
    else:
        assert bias is None


def test_projection_without_inputs_is_the_mean() -> None:
    moments = Moments.empty(0, 2)
    moments.add(torch.zeros(4, 0, dtype=torch.float64), torch.tensor([[1.0, 2.0]] * 4, dtype=torch.float64))
    new, bias = solve_projection(moments, torch.zeros(2, 0), torch.zeros(2), ridge=0.1)
    assert new.shape == (2, 0)
    assert bias is not None
    assert bias.tolist() == [1.0, 2.0]


# --- tuning


@pytest.mark.parametrize("mode", ["scale", "full"])
def test_tuning_nothing_changes_nothing(family: str, mode: str) -> None:
    model, batches = tiny_model(family), [tiny_batch(family, batch=6, seed=s) for s in (1, 2)]
    before = logits(model, batches[0])
    tuning = tune(model, SubNetwork.full(model), batches, mode=mode)  # type: ignore[arg-type]
    assert tuning.stopped_at == ""
    for correction in (*tuning.heads, *tuning.neurons):
        assert float((correction.scales - 1).abs().max()) < 1e-4
    fold_scales(model, tuning)
    assert float((logits(model, batches[0]) - before).abs().max()) < 2e-3


@pytest.mark.parametrize("mode", ["scale", "full"])
@pytest.mark.parametrize("name", ["bert", "electra", "deberta-v2", "vit", "gpt2"])
def test_tuned_is_nearer_to_the_dense_model(name: str, mode: str) -> None:
    model, batches = tiny_model(name), [tiny_batch(name, batch=8, seed=s) for s in range(6)]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    sub = cut(model)
    errors = []
    for tuning in (plain(sub), tune(model, sub, batches, mode=mode)):  # type: ignore[arg-type]
        tuned = copy.deepcopy(model)
        fold_scales(tuned, tuning)
        errors.append(sum(float((logits(tuned, b) - logits(model, b)).square().mean()) for b in batches))
    assert errors[1] < errors[0] * (0.95 if mode == "scale" else 0.3)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in state.items())


@pytest.mark.parametrize("mode", ["scale", "full"])
def test_folded_equals_gated_equals_sliced(family: str, mode: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family, batch=6)
    sub = cut(model)
    tuning = tune(model, sub, [batch], mode=mode)  # type: ignore[arg-type]
    folded = copy.deepcopy(model)
    fold_scales(folded, tuning)
    sliced = apply_edits(copy.deepcopy(folded), [Slice(sub)])
    assert float((logits(sliced, batch) - logits(folded, batch)).abs().max()) < 1e-4
    if mode == "scale":
        with gates(model, [c.scales for c in tuning.heads], [c.scales for c in tuning.neurons]):
            assert float((logits(model, batch) - logits(folded, batch)).abs().max()) < 1e-3


def test_plain_tuning_only_closes_units() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    sub = cut(model)
    heads, neurons = sub.masks()
    with gates(model, heads, neurons):
        expected = logits(model, batch)
    fold_scales(model, plain(sub))
    assert torch.allclose(logits(model, batch), expected, atol=1e-5)


def test_first_block_is_the_least_squares_answer() -> None:
    # layer 0 gets the same input in both networks, so its head scales minimise the plain reconstruction error
    model = tiny_model("bert").double()
    batch = tiny_batch("bert", batch=6)
    found = sites(model)
    heads = [torch.ones(s.units) for s in found.heads]
    heads[0][1] = 0
    sub = SubNetwork.from_masks(heads, [torch.ones(s.units) for s in found.neurons])
    scales = tune(model, sub, [batch], damping=0.0).heads[0].scales
    seen: list[Tensor] = []
    handle = found.heads[0].output.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    logits(model, batch)
    handle.remove()
    context = seen[0][batch["attention_mask"].bool()].view(-1, 4, 8)
    weight = found.heads[0].output.weight.detach().view(32, 4, 8)
    parts = torch.einsum("tuw,huw->uth", context, weight)
    A = torch.stack([*(parts[u].flatten() for u in (0, 2, 3)), torch.ones(parts[0].numel(), dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(A, parts.sum(0).flatten()[:, None]).solution[:3, 0]
    assert torch.allclose(scales[[0, 2, 3]], expected, atol=1e-6)
    assert float(scales[1]) == 0.0


def test_wild_solutions_stop_the_tuning() -> None:
    # only heads of layer 1 remain that hardly write anything: their best scales are far outside ±10
    model = tiny_model("bert")
    found = sites(model)
    with torch.no_grad():
        found.heads[1].output.weight[:, :8] *= 1e-3
    masks = [torch.ones(s.units) for s in found.heads]
    masks[1][1:] = 0
    sub = SubNetwork.from_masks(masks, [torch.ones(s.units) for s in found.neurons])
    tuning = tune(model, sub, [tiny_batch("bert", batch=8)], damping=0.0)
    assert tuning.stopped_at == found.heads[1].name
    assert tuning.heads[1].scales.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert set(tuning.neurons[2].scales.tolist()) == {1.0}


def test_blocks_that_lost_everything() -> None:
    model, batches = tiny_model("bert"), [tiny_batch("bert", batch=8)]
    found = sites(model)
    heads, neurons = ([torch.ones(s.units) for s in blocks] for blocks in (found.heads, found.neurons))
    heads[1][:] = 0
    neurons[0][:] = 0
    neurons[2][1:] = 0  # a single neuron
    sub = SubNetwork.from_masks(heads, neurons)
    for mode in ("scale", "full"):
        tuned = copy.deepcopy(model)
        fold_scales(tuned, tune(model, sub, batches, mode=mode))  # type: ignore[arg-type]
        assert bool(logits(tuned, batches[0]).isfinite().all())


def test_teacher_may_be_a_larger_sub_network() -> None:
    model, batches = tiny_model("bert"), [tiny_batch("bert", batch=8)]
    sub = cut(model, 0.5)
    same = tune(model, sub, batches, teacher=sub)
    for correction in (*same.heads, *same.neurons):
        assert float((correction.scales - (correction.scales != 0).double()).abs().max()) < 1e-4


def test_half_precision_models_are_tuned_in_float32() -> None:
    model = tiny_model("bert").half()
    sub = cut(model)
    tuning = tune(model, sub, [tiny_batch("bert")], mode="full")
    fold_scales(model, tuning)
    assert next(model.parameters()).dtype == torch.float16


def test_tuning_of_another_model_is_refused() -> None:
    with pytest.raises(SecateurError, match="unsliced"):
        fold_scales(tiny_model("bert"), plain(cut(tiny_model("bert", num_hidden_layers=2))))
