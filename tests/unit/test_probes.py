from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from secateur.families import sites
from secateur.gates import gates
from secateur.scores.exact import exact_scores
from secateur.scores.observe import layers, output_divergence, quiet, read_output, recorded, sample, token_mask
from secateur.scores.probes import gram_probe, probe_scores, softmax_probe, softmax_rows
from secateur.scores.trajectory import UnitGradients, cosine_gram, manifold_distance
from secateur.subnetwork import UnitScores
from tests.conftest import tiny_batch, tiny_model


def flat(scores: UnitScores) -> Tensor:
    return torch.cat([*scores.heads, *scores.neurons]).double()


def double(family: str, **overrides: object) -> tuple[nn.Module, dict[str, Tensor]]:
    batch = {k: v.double() if v.is_floating_point() else v for k, v in tiny_batch(family).items()}
    return tiny_model(family, **overrides).double(), batch


def by_small_steps(model: nn.Module, batch: dict[str, Tensor], step: float) -> tuple[Tensor, Tensor]:
    """Both terms with one mask at 1 - ε, over ε²: the second-order value as ε → 0, without any differentiation."""
    found = sites(model)
    stack = layers(found)
    inputs = sample(model, batch, 768, seed=0)
    owner = {b: layer.index for layer in stack for b in (*layer.heads, len(found.heads) + layer.neurons)}
    bent, moved = [], []
    with torch.no_grad(), quiet(model), recorded([layer.tap for layer in stack]) as seen:
        teacher_output = read_output(model(**inputs), inputs, stack[-1].stack)
        teacher = list(seen)
        for block, site in enumerate(found):
            for unit in range(site.units):
                masks = [torch.ones(s.units, dtype=torch.float64) for s in found]
                masks[block][unit] = 1 - step
                with gates(found, masks[: len(found.heads)], masks[len(found.heads) :]):
                    output = read_output(model(**inputs), inputs, stack[-1].stack)
                later = [z for z in range(len(stack)) if z > owner[block]] or [len(stack) - 1]
                real = [token_mask(inputs, stack[z].stack, teacher[z]) for z in later]
                bent.append(sum(float(manifold_distance(teacher[z][r], seen[z][r])) for z, r in zip(later, real)))
                moved.append(float(output_divergence(teacher_output, output.values[None], 4.0)))
    return torch.tensor(bent).double() / step**2, torch.tensor(moved).double() / step**2


def test_gram_probe_is_the_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    probe = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    (expected,) = torch.autograd.grad((cosine_gram(features) * probe).sum(), features)
    assert torch.allclose(gram_probe(features.detach(), probe, normalise=False), expected)
    scaled = expected / cosine_gram(features.detach()).norm()
    assert torch.allclose(gram_probe(features.detach(), probe), scaled)


def test_softmax_rows_are_the_fisher_form() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, generator=generator)
    jacobian = torch.randn(3, 2, 4, generator=generator)  # (classes, examples, units)
    rows = softmax_rows(jacobian, logits, temperature=4.0)
    for example in range(2):
        p = torch.softmax(logits[example] / 4, -1)
        metric = torch.diag(p) - torch.outer(p, p)
        j = jacobian[:, example]
        assert torch.allclose(rows[:, example].square().sum(0), 0.5 * (j.T @ metric @ j).diagonal(), atol=1e-6)


def test_softmax_probe_has_the_fisher_covariance() -> None:
    logits = torch.tensor([1.0, -1.0, 2.0])
    noise = torch.randn(200_000, 3, generator=torch.Generator().manual_seed(0))
    u = softmax_probe(logits.expand(200_000, 3), noise, temperature=1.0)
    p = torch.softmax(logits, -1)
    assert torch.allclose(u.T @ u / len(u), 0.5 * (torch.diag(p) - torch.outer(p, p)), atol=2e-3)


SMALL = {
    "bert": dict(intermediate_size=20),
    "vit": dict(intermediate_size=20, num_hidden_layers=2),
    "t5": dict(d_ff=8),
}


@pytest.mark.parametrize("name", ["bert", "vit", "t5"])
def test_probes_average_to_the_second_order_value(name: str) -> None:
    model, batch = double(name, **SMALL[name])
    bent, moved = by_small_steps(model, batch, step=1e-4)
    estimate = probe_scores(model, [batch], probes=150, output_probes=50)
    ratio = flat(estimate.trajectory) / bent
    assert float(ratio.mean()) == pytest.approx(1, abs=0.05)
    assert float((flat(estimate.output) / moved).mean()) == pytest.approx(1, abs=0.05)


def test_output_term_is_exact_for_few_classes() -> None:
    model, batch = double("bert", **SMALL["bert"])  # two classes
    _, moved = by_small_steps(model, batch, step=1e-4)
    estimate = probe_scores(model, [batch], probes=1)
    assert torch.allclose(flat(estimate.output), moved, rtol=1e-2, atol=1e-12)


def test_output_term_of_a_regression() -> None:
    model, batch = double("bert", num_labels=1, **SMALL["bert"])
    _, moved = by_small_steps(model, batch, step=1e-4)
    assert torch.allclose(flat(probe_scores(model, [batch], probes=1).output), moved, rtol=1e-2, atol=1e-12)


def test_relative_spread_shrinks_with_the_number_of_probes() -> None:
    model, batch = double("bert")
    several = torch.stack([flat(probe_scores(model, [batch], probes=8, seed=s).trajectory) for s in range(16)])
    spread = (several.std(0) / several.mean(0)).mean()
    assert float(spread) == pytest.approx((2 / 8) ** 0.5, rel=0.15)


def test_own_layer_is_left_out_exactly() -> None:
    # only the second of two layers has a later map, its own: both ways of counting agree there, not in the first
    model, batch = double("bert", num_hidden_layers=2)
    later = probe_scores(model, [batch], probes=64)
    own = probe_scores(model, [batch], probes=64, own_layer=True)
    assert torch.allclose(later.trajectory.neurons[1].mean(), own.trajectory.neurons[1].mean(), rtol=0.2)
    assert float(own.trajectory.neurons[0].mean()) > 1.1 * float(later.trajectory.neurons[0].mean())


def test_agrees_with_masking_in_rank() -> None:
    model, batch = double("roberta")
    estimate = flat(probe_scores(model, [batch], probes=64).trajectory)
    truth = flat(exact_scores(model, [batch]).trajectory)
    ranks = torch.stack([v.argsort().argsort().double() for v in (estimate, truth)])
    assert float(torch.corrcoef(ranks)[0, 1]) > 0.95


def test_units_without_effect_score_zero() -> None:
    model, batch = double("bert")
    found = sites(model)
    with torch.no_grad():
        found.neurons[0].output.weight[:, 5] = 0
        found.heads[1].output.weight[:, 8:16] = 0
    scores = probe_scores(model, [batch], probes=4)
    assert float(scores.trajectory.neurons[0][5]) < 1e-20
    assert float(scores.trajectory.heads[1][1]) < 1e-20
    assert float(scores.output.heads[1][1]) < 1e-20
    assert float(scores.trajectory.neurons[0][:5].min()) > 1e-12


def test_padding_does_not_count() -> None:
    model, batch = double("bert")
    padded = {name: nn.functional.pad(value, (0, 4)) for name, value in batch.items()}
    filled = dict(batch, input_ids=batch["input_ids"].masked_fill(batch["attention_mask"] == 0, 7))
    plain = flat(probe_scores(model, [batch]).trajectory)
    for other in (padded, filled):
        assert torch.allclose(plain, flat(probe_scores(model, [other]).trajectory), rtol=1e-6)


def test_kept_gradients_give_the_scores() -> None:
    model, batch = double("bert")
    other = {key: value[1:] for key, value in batch.items()}
    scores = probe_scores(model, [batch, other], probes=5, keep_gradients=True)
    bent, moved = scores.trajectory_gradients, scores.output_gradients
    assert isinstance(bent, UnitGradients)
    assert isinstance(moved, UnitGradients)
    assert bent.neurons[0].shape == (10, 48)
    assert torch.allclose(flat(bent.scores()), flat(scores.trajectory))
    assert torch.allclose(flat(moved.scores()), flat(scores.output))


def test_seed_decides() -> None:
    model, batch = double("bert")
    a, b, c = (flat(probe_scores(model, [batch], probes=2, seed=s).trajectory) for s in (1, 1, 2))
    assert torch.equal(a, b)
    assert not torch.equal(a, c)


def test_bfloat16_is_close() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    exact = flat(probe_scores(model, [batch], probes=8).trajectory)
    rough = flat(probe_scores(model, [batch], probes=8, bf16=True).trajectory)
    assert float(((rough - exact).abs() / exact).median()) < 0.1


def test_sum_form_is_larger_by_the_gram() -> None:
    model, batch = double("bert", num_hidden_layers=1)
    normalised = flat(probe_scores(model, [batch], probes=3).trajectory)
    plain = flat(probe_scores(model, [batch], probes=3, normalise=False).trajectory)
    factor = plain / normalised
    assert torch.allclose(factor, factor[0].expand_as(factor))
    assert float(factor[0]) > 1


def test_model_is_left_as_it_was() -> None:
    model = tiny_model("gpt2").train()
    probe_scores(model, [tiny_batch("gpt2")], probes=1, output_probes=1)
    assert model.training
    assert model.config.use_cache
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in model.modules())
