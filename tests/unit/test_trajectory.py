from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.scores.trajectory import (
    TrajectoryScores,
    UnitGradients,
    combine,
    combine_gradients,
    cosine_gram,
    gram_change,
    gram_norm,
    kl_divergence,
    manifold_distance,
    near_cut,
    output_share,
    refined,
    squared_difference,
    unit_tokens,
)
from secateur.subnetwork import SubNetwork, UnitScores


def features(tokens: int, hidden: int, seed: int = 0) -> Tensor:
    return torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def scores(heads: list[list[float]], neurons: list[list[float]]) -> UnitScores:
    return UnitScores([torch.tensor(h) for h in heads], [torch.tensor(n) for n in neurons])


def test_gram_of_two_tokens() -> None:
    gram = cosine_gram(torch.tensor([[2.0, 0.0], [3.0, 3.0]]))
    assert torch.allclose(gram, torch.tensor([[1.0, 0.5**0.5], [0.5**0.5, 1.0]]))


def test_distance_by_hand() -> None:
    # the angle between the two tokens goes from 90 to 0 degrees: two entries change from 0 to 1, ||G||² was 2
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    student = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
    assert float(manifold_distance(teacher, student, normalise=False)) == pytest.approx(2.0)
    assert float(manifold_distance(teacher, student)) == pytest.approx(1.0)


def test_distance_is_zero_for_rotations_and_rescalings() -> None:
    f = features(7, 4)
    rotation = torch.linalg.qr(features(4, 4, seed=1)).Q
    scale = torch.rand(7, 1, dtype=torch.float64) + 0.1
    assert float(manifold_distance(f, f)) == 0.0
    assert float(manifold_distance(f, f @ rotation, normalise=False)) < 1e-24
    assert float(manifold_distance(f, f * scale, normalise=False)) < 1e-24


@pytest.mark.parametrize("tokens", [5, 40])  # both ways of computing: tokens below and above 3 × hidden
def test_distance_is_that_of_the_grams(tokens: int) -> None:
    a, b = features(tokens, 6), features(tokens, 6, seed=1)
    expected = (cosine_gram(a) - cosine_gram(b)).square().sum()
    assert torch.allclose(manifold_distance(a, b, normalise=False), expected)
    assert torch.allclose(manifold_distance(b, a, normalise=False), expected)
    assert torch.allclose(manifold_distance(a, b), expected / cosine_gram(a).square().sum())
    assert float(expected) <= 4 * tokens**2
    assert torch.allclose(gram_norm(unit_tokens(a)), cosine_gram(a).norm())


def test_change_of_many_variants_at_once() -> None:
    before = unit_tokens(features(6, 5))
    after = torch.stack([unit_tokens(features(6, 5, seed=s)) for s in (1, 2)])
    both = gram_change(before, after)
    assert torch.allclose(both, torch.stack([gram_change(before, a) for a in after]))


def test_dead_tokens_do_not_divide_by_zero() -> None:
    assert float(manifold_distance(torch.zeros(3, 2), torch.zeros(3, 2))) == 0.0


def test_kl_by_hand() -> None:
    # T = 1, p = (3/4, 1/4), q = (1/2, 1/2)
    value = kl_divergence(torch.tensor([math.log(3.0), 0.0]), torch.zeros(2), temperature=1.0)
    assert float(value) == pytest.approx(0.75 * math.log(1.5) + 0.25 * math.log(0.5))


def test_kl_divides_logits_by_the_temperature() -> None:
    teacher, student = torch.tensor([4 * math.log(3.0), 0.0]), torch.zeros(2)
    expected = 16 * (0.75 * math.log(1.5) + 0.25 * math.log(0.5))
    assert float(kl_divergence(teacher, student, temperature=4.0)) == pytest.approx(expected, rel=1e-6)


def test_kl_ignores_constants_and_a_single_logit() -> None:
    a, b = features(3, 4), features(3, 4, seed=1)
    assert torch.allclose(kl_divergence(a, b), kl_divergence(a + 3.0, b - 5.0))
    assert torch.equal(kl_divergence(a, a), torch.zeros(3, dtype=torch.float64))
    assert torch.equal(kl_divergence(a[:, :1], b[:, :1]), torch.zeros(3, dtype=torch.float64))


def test_kl_at_high_temperature_is_half_the_mean_squared_difference() -> None:
    a, b = features(3, 4), features(3, 4, seed=1)
    centred = (a - a.mean(-1, keepdim=True)) - (b - b.mean(-1, keepdim=True))
    limit = 0.5 * centred.square().mean(-1)
    assert torch.allclose(kl_divergence(a, b, temperature=1e4), limit, rtol=1e-3)


def test_squared_difference() -> None:
    assert float(squared_difference(torch.tensor([1.0]), torch.tensor([3.5]))) == 6.25


def test_combine_by_hand() -> None:
    both = TrajectoryScores(scores([[1.0, 3.0]], [[4.0]]), scores([[2.0, 0.0]], [[2.0]]))
    assert output_share(both) == 2.0
    total = combine(both, lambda_c=0.1)
    assert total.heads[0].tolist() == pytest.approx([1.4, 3.0])
    assert total.neurons[0].tolist() == pytest.approx([4.4])


def test_combine_without_any_effect_on_the_output() -> None:
    both = TrajectoryScores(scores([[1.0]], [[2.0]]), scores([[0.0]], [[0.0]]))
    assert combine(both).heads[0].tolist() == [1.0]


def test_combined_gradients_give_the_combined_scores() -> None:
    bent = UnitGradients([features(5, 2)], [features(5, 3, seed=1)])
    moved = UnitGradients([features(4, 2, seed=2)], [features(4, 3, seed=3)])
    both = TrajectoryScores(bent.scores(), moved.scores(), bent, moved)
    diagonal, expected = combine_gradients(both, 0.3).scores(), combine(both, 0.3)
    assert torch.allclose(diagonal.heads[0], expected.heads[0])
    assert torch.allclose(diagonal.neurons[0], expected.neurons[0])


def test_combined_gradients_need_gradients() -> None:
    both = TrajectoryScores(scores([[1.0]], [[2.0]]), scores([[0.0]], [[0.0]]))
    with pytest.raises(SecateurError, match="keep_gradients=True"):
        combine_gradients(both)


def test_refined_replaces_only_what_was_scored() -> None:
    old = TrajectoryScores(scores([[1.0, 2.0]], [[3.0]]), scores([[1.0, 2.0]], [[3.0]]))
    new = TrajectoryScores(scores([[math.nan, 9.0]], [[math.nan]]), scores([[math.nan, 8.0]], [[math.nan]]))
    merged = refined(old, new)
    assert merged.trajectory.heads[0].tolist() == [1.0, 9.0]
    assert merged.output.heads[0].tolist() == [1.0, 8.0]
    assert merged.trajectory.neurons[0].tolist() == [3.0]


def test_near_cut_takes_both_sides() -> None:
    # six heads, three removed: the cut lies between the scores 3 and 4
    chosen = near_cut(
        scores([[6.0, 3.0, 1.0], [5.0, 2.0, 4.0]], [[1.0, 2.0]]),
        SubNetwork(((True, False, False), (True, False, True)), ((True, True),)),
        share=1 / 3,
    )
    assert chosen.heads == ((False, True, False), (False, False, True))
