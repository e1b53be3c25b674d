"""Token scores, ACC, profiles, counts and their MACs, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.costs.dial import interpolated
from secateur.costs.tokens import LayerCost, TokenCosts, token_costs
from secateur.edits.tokens import DropTokens
from secateur.errors import InvalidBudget, InvalidData, SecateurError, UnsupportedModel
from secateur.optimize.tokens import UNREAD, Changes, relative_change
from secateur.tokens.layout import Layout
from secateur.tokens.scores import asking, column_attention, context_size, counts, profile, shares, smoothed
from tests.conftest import tiny_model

HEADS = torch.tensor(
    [
        [[0.7, 0.1, 0.2, 0], [0.25, 0.5, 0.25, 0], [0.4, 0.4, 0.2, 0], [0.3, 0.3, 0.4, 0]],
        [[0.1, 0.6, 0.3, 0], [0.2, 0.2, 0.6, 0], [0.5, 0.25, 0.25, 0], [0.1, 0.8, 0.1, 0]],
    ]
)[None]
REAL = torch.tensor([[True, True, True, False]])
INF = math.inf
BASE = TokenCosts((LayerCost(0, 4 * 768**2, 2 * 768, 2 * 768 * 3072),) * 12)
LINEAR = tuple(1 - 0.9 * layer / 12 for layer in range(1, 13))


def close(found: torch.Tensor, wanted: list[float]) -> None:
    torch.testing.assert_close(found, torch.tensor(wanted)[None], atol=1e-6, rtol=0)


def test_column_attention_leaves_padding_queries_out() -> None:
    close(column_attention(HEADS, REAL), [0.3583333, 0.3416667, 0.3, -INF])
    close(column_attention(HEADS, REAL, diagonal=False), [0.225, 0.225, 0.225, -INF])
    # with the padded query the ranking would be another: [0.31875, 0.39375, 0.2875]
    everyone = column_attention(HEADS, torch.ones(1, 4, dtype=torch.bool))
    close(everyone, [0.31875, 0.39375, 0.2875, 0.0])


def test_column_attention_weighted_by_values() -> None:
    values = torch.zeros(1, 2, 4, 2)
    values[0, 0] = torch.tensor([[3.0, 4.0], [0.0, 1.0], [0.0, 0.0], [9.0, 9.0]])  # norms 5, 1, 0
    values[0, 1] = torch.tensor([[0.0, 2.0], [0.0, 1.0], [1.0, 0.0], [9.0, 9.0]])  # norms 2, 1, 1
    # columns over the three real queries: head 0 (1.35, 1.0, 0.65), head 1 (0.8, 1.05, 1.15)
    parts = [1.35 * 5 + 0.8 * 2, 1.0 + 1.05, 1.15]
    close(column_attention(HEADS, REAL, values=values), [*(p / sum(parts) for p in parts), -INF])


def test_few_queries_of_long_examples_are_spread_or_at_the_end() -> None:
    lengths = torch.tensor([13, 3, 2])
    assert asking(lengths, 3, tokens=13).tolist() == [[0, 4, 8], [0, 1, 2], [0, 1, -1]]
    assert asking(lengths, 3, tokens=13, causal=True).tolist() == [[10, 11, 12], [0, 1, 2], [0, 1, -1]]
    # up to four times as many are all asked
    assert asking(torch.tensor([12]), 3, tokens=12).tolist() == [list(range(12))]
    assert asking(torch.tensor([12]), 3, tokens=12, causal=True).tolist() == [list(range(12))]


def test_column_attention_of_few_queries() -> None:
    places = torch.tensor([[0, 2, -1]])
    asked = HEADS[:, :, [0, 2, 3]]
    # columns: head 0 (1.1, 0.5, 0.4), head 1 (0.6, 0.85, 0.55); over two heads and two queries
    close(column_attention(asked, REAL, places=places), [0.425, 0.3375, 0.2375, -INF])
    # tokens 0 and 2 paid themselves 0.7 and 0.2, 0.1 and 0.25
    close(column_attention(asked, REAL, places=places, diagonal=False), [0.225, 0.3375, 0.125, -INF])
    every = torch.tensor([[0, 1, 2, -1]])
    for diagonal in (True, False):
        alike = column_attention(HEADS, REAL, places=every, diagonal=diagonal)
        torch.testing.assert_close(alike, column_attention(HEADS, REAL, diagonal=diagonal))


@pytest.mark.parametrize("diagonal", [True, False])
def test_last_queries_under_uniform_causal_attention_find_all_tokens_alike(diagonal: bool) -> None:
    n = 6
    uniform = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    real, places = torch.ones(1, n, dtype=torch.bool), torch.tensor([[3, 4, 5]])
    found = column_attention(uniform[None, None, 3:], real, causal=True, places=places, diagonal=diagonal)
    torch.testing.assert_close(found[0], torch.tensor([1.0, 1, 1, 1, 1, float(diagonal)]))


def test_context_size_of_the_example() -> None:
    score = column_attention(HEADS, REAL)
    assert 3 * float(context_size(score, "participation")) == pytest.approx(2.983838, abs=1e-5)
    assert 3 * float(context_size(score, "entropy")) == pytest.approx(2.991781, abs=1e-5)
    assert float(context_size(score, "mass", rho=0.7)) == pytest.approx(2 / 3)  # 0.3583 + 0.3417 = 0.7
    assert float(context_size(score, "mass", rho=0.71)) == pytest.approx(1)
    assert float(context_size(score, "count", tau=1.05)) == pytest.approx(1 / 3)  # only 0.3583 ≥ 0.35


@pytest.mark.parametrize("n", [1, 2, 10, 100])
def test_context_size_of_uniform_attention(n: int) -> None:
    score = torch.full((1, n + 2), 1 / n)
    score[:, n:] = -INF
    assert float(context_size(score, "mass", rho=0.95)) == pytest.approx(math.ceil(0.95 * n) / n)
    for functional in ("participation", "entropy", "count"):
        assert float(context_size(score, functional)) == pytest.approx(1, abs=1e-5)  # type: ignore[arg-type]


@pytest.mark.parametrize("functional", ["mass", "participation", "entropy", "count"])
def test_context_size_of_a_sink_and_of_a_permutation(functional: str) -> None:
    sink = torch.tensor([[1.0, 0, 0, 0, 0]])
    assert float(context_size(sink, functional)) == pytest.approx(0.2)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    score = torch.rand(4, 7, generator=generator)
    mixed = score[:, torch.randperm(7, generator=generator)]
    a, b = context_size(score, functional), context_size(mixed, functional)  # type: ignore[arg-type]
    torch.testing.assert_close(a, b)


def test_smoothing_averages_over_layers() -> None:
    now, before = torch.tensor([[0.5, 0.3, 0.2, -INF]]), torch.tensor([[0.1, 0.3, 0.4, 0.9]])
    # the survivors' old scores, scaled to a sum of 1: (0.125, 0.375, 0.5)
    close(smoothed(now, before, 0.4), [0.35, 0.33, 0.32, -INF])
    assert smoothed(now, before, 0.0) is now
    assert smoothed(now, None, 0.4) is now


def test_profile_is_a_running_minimum() -> None:
    assert profile([0.9, 0.95, 0.5, 0.6]) == (0.9, 0.9, 0.5, 0.5)
    with pytest.raises(SecateurError, match="between 0 and 1, not at 1.2"):
        profile([1.2])


def test_shares_are_powers_with_a_floor() -> None:
    assert shares((0.5, 0.25), 0.0) == (1.0, 1.0)
    assert shares((0.5, 0.25), 2.0, least=0.1) == (0.25, 0.1)
    second = (0.3, 0.2)  # reached at 2, by way of the geometric mean
    assert shares((0.5, 0.25), 1.0, steeper=second) == (0.5, 0.25)
    assert shares((0.5, 0.25), 1.5, steeper=second) == pytest.approx((0.15**0.5, 0.05**0.5))
    assert shares((0.5, 0.25), 2.0, steeper=second) == pytest.approx(second)
    assert shares((0.5, 0.25), 3.0, steeper=second) == pytest.approx((0.09, 0.04))


@pytest.mark.parametrize(
    ("m", "alpha", "kept", "speedup"),
    [
        (LINEAR, 0.5, [124, 119, 113, 108, 102, 95, 89, 81, 73, 64, 54, 41], 1.4129),
        (LINEAR, 1, [119, 109, 100, 90, 80, 71, 61, 52, 42, 32, 23, 13], 1.8615),
        (LINEAR, 2, [110, 93, 77, 63, 50, 39, 29, 21, 14, 8, 4, 2], 2.8020),
        (LINEAR, 3, [102, 79, 60, 44, 32, 22, 14, 9, 5, 2, 1, 1], 3.7401),
        (tuple(0.8**layer for layer in range(1, 13)), 1, [103, 82, 66, 53, 42, 34, 27, 22, 18, 14, 11, 9], 2.9754),
        ((1.0,) * 12, 3, [128] * 12, 1.0),
    ],
)
def test_counts_and_speedups_of_profiles(m: tuple[float, ...], alpha: float, kept: list[int], speedup: float) -> None:
    found = [row[0] for row in counts([128], shares(m, alpha, least=0.0))]
    assert found == kept
    assert BASE.speedup(128, found) == pytest.approx(speedup, abs=5e-5)


def test_counts_are_of_each_examples_own_length() -> None:
    assert counts([10, 3, 1], (0.7, 0.35), protected=2) == [[7, 3, 1], [4, 2, 1]]


def test_macs_of_bert_base() -> None:
    wanted = {64: 5511315456, 128: 11173625856, 256: 22951231488, 384: 35332816896, 512: 48318382080}
    assert {n: BASE.macs(n, [n] * 12) for n in wanted} == wanted
    one = TokenCosts((LayerCost(0, 4 * 768**2, 2 * 768, 2 * 768 * 3072),))
    assert (one.macs(1, [1]), one.macs(2, [2])) == (7_079_424, 14_161_920)
    steps = [128] * 4 + [64] * 4 + [32] * 4
    assert BASE.speedup(128, steps) == pytest.approx(1.66175, abs=5e-6)


@pytest.mark.parametrize(
    ("speedup", "tokens", "alpha"),
    [(2, 128, 1.1537), (2, 512, 1.1028), (3, 128, 2.2174), (3, 512, 2.1366), (4.8, 128, 4.1050), (4.8, 512, 3.9757)],
)
def test_solver(speedup: float, tokens: int, alpha: float) -> None:
    found = BASE.solve(LINEAR, speedup, tokens, least=0.0, protected=1)
    assert found == pytest.approx(alpha, abs=2e-4)
    assert speedup <= BASE.at(LINEAR, found, tokens, 0.0, 1) <= 1.005 * speedup


def test_solver_reports_its_reach() -> None:
    with pytest.raises(InvalidBudget, match="beyond this model's reach at 128 tokens: the largest is 27.2"):
        BASE.solve(LINEAR, 50, 128, least=0.0, protected=1)
    with pytest.raises(SecateurError, match="at least 1"):
        BASE.solve(LINEAR, 0.5, 128, least=0.0, protected=1)
    assert BASE.solve(LINEAR, 1, 128, least=0.0, protected=1) == 0


def test_token_costs_are_counted_on_the_model() -> None:
    cost = token_costs(tiny_model("bert")).layers[0]
    assert cost == LayerCost(0, 4 * 32**2, 2 * 32, 2 * 32 * 48)


def test_layout_keeps_order_and_goes_both_ways() -> None:
    real = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]], dtype=torch.bool)  # padded left, right, not
    layout = Layout.of_mask(real, packed=True)
    assert layout.lengths == (3, 2, 4)
    assert layout.slots[0, :3].tolist() == [1, 2, 3]
    assert layout.slots[1, :2].tolist() == [0, 1]
    assert layout.cu_seqlens.tolist() == [0, 3, 5, 9]
    packed = torch.arange(9.0)
    assert layout.pad(packed, -1).tolist() == [[0, 1, 2, -1], [3, 4, -1, -1], [5, 6, 7, 8]]
    assert torch.equal(layout.pack(layout.pad(packed)), packed)
    score = torch.tensor([[5.0, 1, 4, 9], [2, 2, 0, 0], [1, 3, 0, 1]])
    columns = layout.best(score, (2, 1, 3))
    less = layout.take(columns, (2, 1, 3))
    assert [row[:n].tolist() for row, n in zip(columns, less.lengths, strict=True)] == [[0, 3], [0], [0, 1, 3]]
    score[0, 3] = -INF  # padding
    columns = layout.best(score, (2, 1, 3))
    less = layout.take(columns, (2, 1, 3))
    assert [row[:n].tolist() for row, n in zip(less.slots, less.lengths, strict=True)] == [[1, 3], [0], [0, 1, 3]]


def test_groups_hold_like_lengths() -> None:
    lengths = (10, 2, 9, 10, 2)
    mask = torch.arange(10) < torch.tensor(lengths)[:, None]
    layout = Layout.of_mask(mask, packed=True)
    assert [group.shape for group in layout.groups] == [(3, 10), (2, 2)]
    rows = torch.cat([group.index[group.rows] for group in layout.groups])
    assert torch.equal(rows[layout.from_groups], torch.arange(sum(lengths)))


def test_dial_says_what_is_wrong() -> None:
    model = tiny_model("bert")
    edit = DropTokens(profile=(0.8, 0.55, 0.3), tokens=16)
    edit.apply(model)
    dial = model.secateur
    with pytest.raises(SecateurError, match="at least 1"):
        dial.speedup = 0.9
    with pytest.raises(InvalidBudget, match="beyond this model's reach"):
        dial.speedup = 1000
    with pytest.raises(SecateurError, match="not '2'"):
        dial.speedup = "2"
    with pytest.raises(AttributeError):
        dial.speed_up = 2
    with pytest.raises(SecateurError, match="eliminates tokens already"):
        edit.apply(model)
    with pytest.raises(SecateurError, match="The profile has 2 layers, the model 3"):
        DropTokens(profile=(0.8, 0.5)).apply(tiny_model("bert"))
    with pytest.raises(UnsupportedModel, match="Tokens of 'vit' models cannot be eliminated"):
        DropTokens(profile=(0.8, 0.55, 0.3)).apply(tiny_model("vit"))
    dial.speedup = 1.5
    with pytest.raises(InvalidData, match="Row 1 of the attention_mask has no real token"):
        model(torch.ones(2, 4, dtype=torch.long), attention_mask=torch.tensor([[1, 1, 0, 0], [0, 0, 0, 0]]))
    assert model(torch.ones(1, 1, dtype=torch.long)).logits.shape == (1, 2)  # and the pass before left nothing behind


def test_speedup_of_the_dial_is_the_solvers() -> None:
    model = tiny_model("bert")
    DropTokens(profile=(0.8, 0.55, 0.3), tokens=64).apply(model)
    assert model.secateur.speedup == 1
    model.secateur.speedup = 2
    assert 2 <= model.secateur.speedup < 2.1
    assert model.secateur.edit.alpha == model.secateur.alpha > 0


def test_causal_attention_is_judged_by_what_uniform_attention_would_give() -> None:
    n = 6
    uniform = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    raw = column_attention(uniform[None, None], torch.ones(1, n, dtype=torch.bool))
    torch.testing.assert_close(raw[0], torch.tensor([0.408, 0.242, 0.158, 0.103, 0.061, 0.028]), atol=5e-4, rtol=0)
    fair = column_attention(uniform[None, None], torch.ones(1, n, dtype=torch.bool), causal=True)
    torch.testing.assert_close(fair[0], torch.ones(n))


def test_latency_is_interpolated_between_settings() -> None:
    alphas, medians = [0.0, 1.0, 2.0], [10.0, 6.0, 4.0]
    assert interpolated(alphas, medians, 8) == pytest.approx(0.5)
    assert interpolated(alphas, medians, 5) == pytest.approx(1.5)
    assert interpolated(alphas, medians, 12) == 0  # the dense model is fast enough
    assert interpolated(alphas, medians, 3) is None


def test_causal_attention_without_the_diagonal() -> None:
    """Under uniform causal attention every token but the last, which nothing after it looks at, is worth the same."""
    n = 5
    uniform = torch.tril(torch.ones(n, n)) / torch.arange(1, n + 1)[:, None]
    fair = column_attention(uniform[None, None], torch.ones(1, n, dtype=torch.bool), causal=True, diagonal=False)
    torch.testing.assert_close(fair[0], torch.tensor([1.0, 1, 1, 1, 0]))


def test_sufficient_shares_are_where_the_output_stays() -> None:
    """Changes 1 - r at layer 0, (1 - r)/2 at layer 1, as much at 2 as at 0; nothing reads what leaves layer 3."""
    asked = []

    def change(shares: tuple[float, ...]) -> float:
        asked.append(shares)
        first = next(i for i, share in enumerate(shares) if share < 1)
        return (1 - shares[first]) * (1, 0.5, 1, 0)[first]

    found = Changes.measure(change, 4, least=0.02)
    assert found.shares == (1.0, 0.85, 0.7, 0.5, 0.35, 0.25, 0.15, 0.08, 0.02)
    assert asked[0] == (0.02, 0.02, 0.02, 0.02)
    assert len(asked) == 3 * 8 + 1
    # layer 2 would need 0.8 but gets no more than layer 1 hands on
    assert found.sufficient(0.2) == pytest.approx((0.8, 0.6, 0.6, UNREAD))
    assert found.sufficient(0.0) == (63 / 64, 63 / 64, 63 / 64, UNREAD)
    assert found.sufficient(2.0) == (0.02, 0.02, 0.02, UNREAD)
    # 1 / the sum of the shares: 0.5 + 0 + 0 at a tolerance of 0.5
    assert found.sufficient_for(lambda shares: 1 / sum(shares), 1 / 0.54) == pytest.approx(
        (0.5, 0.02, 0.02, UNREAD), abs=1e-5
    )
    assert found.sufficient_for(lambda shares: 1 / sum(shares), 1e9) == pytest.approx((0.02, 0.02, 0.02, UNREAD))


def test_changes_that_fall_again_count_as_their_largest() -> None:
    found = Changes.measure(lambda shares: 0.3 if shares[0] == 0.5 else 0.1, 1, least=0.5)
    assert found.table == ((0.0, 0.1, 0.1, 0.3),)
    assert found.sufficient(0.05) == (pytest.approx(0.925),)
    assert found.sufficient(0.2) == (pytest.approx(0.6),)


def test_relative_change_counts_in_variances() -> None:
    wanted = torch.tensor([[1.0], [3.0]])  # mean 2, spread 1 + 1
    assert relative_change(torch.tensor([[2.0], [2.0]]), wanted) == 1
    assert relative_change(torch.tensor([[1.5], [3.0]]), wanted) == pytest.approx(0.125)
    classes = torch.tensor([[0.0, 2.0], [2.0, 0.0]])
    assert relative_change(classes + torch.tensor([[5.0], [-3.0]]), classes) == 0  # an offset changes no probability
