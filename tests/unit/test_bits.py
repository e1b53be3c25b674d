"""Quantisers, their gradients and words of bits, against values computed by hand (spec 12)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from secateur.bits.modules import AttentionBits, BinaryEmbedding, BinaryLinear, Quantizer
from secateur.bits.packing import packed, unpacked
from secateur.bits.quantizers import BITS, Levels, binarized, first_alpha, scaled_gradient, to_levels
from secateur.errors import SecateurError

X = [-0.3, 0.0, 0.1, 0.24, 0.25, 0.3, 0.49, 0.51, 0.9]


def gradients(x: torch.Tensor, alpha: float, shift: float, levels: Levels) -> list[list[float]]:
    """y, dy/dx, dy/dα and dy/dβ of each entry by itself."""
    found = []
    for value in x:
        one, a, b = (torch.tensor(t, dtype=torch.float64, requires_grad=True) for t in ([[value]], alpha, [shift]))
        y = to_levels(one, a, b, levels) * a
        y.backward()
        found.append([float(t.detach()) for t in (y, one.grad, a.grad, b.grad)])  # type: ignore[arg-type]
    return [list(column) for column in zip(*found, strict=True)]


def test_the_table_of_the_unsigned_set() -> None:
    y, dx, dalpha, dshift = gradients(torch.tensor(X, dtype=torch.float64), 0.5, 0.0, Levels(1, signed=False))
    assert y == [0, 0, 0, 0, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert dx == [0, 1, 1, 1, 1, 1, 1, 0, 0]
    assert dalpha == pytest.approx([0, 0, -0.2, -0.48, 0.5, 0.4, 0.02, 1, 1])
    assert dshift == [-one for one in dx]


def test_the_table_of_the_signed_set() -> None:
    y, dx, dalpha, dshift = gradients(torch.tensor(X, dtype=torch.float64), 0.4, 0.1, Levels(1, signed=True))
    assert y == pytest.approx([-0.4, -0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4, 0.4])  # sgn(0) = 1 at x = 0.1
    assert dx == [1, 1, 1, 1, 1, 1, 1, 0, 0]  # |x - 0.1| <= 0.4; 0.51 and 0.9 lie outside
    assert dalpha == [-1, -1, 1, 1, 1, 1, 1, 1, 1]
    assert dshift == [-one for one in dx]


@pytest.mark.parametrize("levels", [Levels(1, False), Levels(2, True), Levels(2, False), Levels(4, True)])
def test_it_is_autograd_of_straight_through_rounding(levels: Levels) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    upstream = torch.randn(40, 6, generator=generator, dtype=torch.float64)
    found, wanted = [], []
    for results in (found, wanted):
        here, a, b = x.clone().requires_grad_(), torch.tensor(0.3).double(), torch.full((6,), 0.05).double()
        a.requires_grad_(), b.requires_grad_()
        if results is found:
            y = to_levels(here, a, b, levels) * a
        else:
            clipped = ((here - b) / a).clamp(levels.lowest, levels.highest)
            y = (clipped + ((clipped + 0.5).floor() - clipped).detach()) * a
        y.backward(upstream)
        results += [y.detach(), here.grad, a.grad, b.grad]
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


def test_levels() -> None:
    assert [(Levels(b, True).lowest, Levels(b, True).highest) for b in BITS] == [(-1, 1), (-2, 1), (-8, 7), (-128, 127)]
    assert [(Levels(b, False).lowest, Levels(b, False).highest) for b in BITS] == [(0, 1), (0, 3), (0, 15), (0, 255)]
    x = torch.tensor([-9.0, -1.5, -0.5, 0.5, 9.0])
    assert to_levels(x, torch.tensor(1.0), None, Levels(2, True)).tolist() == [-2, -1, 0, 1, 1]  # ties go up
    assert to_levels(x, torch.tensor(1.0), None, Levels(2, False)).tolist() == [0, 0, 0, 1, 3]
    for bits in (0, 3, 16, True):
        with pytest.raises(SecateurError, match="1, 2, 4 or 8 bits"):
            Levels(bits, True)


def test_half_precision_reaches_no_level_beyond_the_last() -> None:
    x = torch.arange(0, 300, dtype=torch.bfloat16)
    found = to_levels(x, torch.tensor(1.0, dtype=torch.bfloat16), None, Levels(8, False))
    assert found.tolist() == x.float().clamp(max=255).tolist()


def test_homogeneity() -> None:
    x = torch.linspace(-2, 2, 41)
    one, other = torch.tensor(0.5), torch.tensor(3.0)
    assert torch.equal(to_levels(x, one, None, Levels(1, True)), to_levels(x, other, None, Levels(1, True)))
    shift = torch.full((41,), 0.25)
    assert torch.equal(  # f(cx; ca, cb) = c f(x; a, b), with c = 4
        to_levels(4 * x, 4 * one, 4 * shift, Levels(1, False)), to_levels(x, one, shift, Levels(1, False))
    )


def test_the_gradient_of_the_scale_shrinks_with_the_tensor() -> None:
    for shape in ((4, 8), (16, 8)):
        for kind in (Levels(1, True), Levels(2, True), Levels(4, True), Levels(2, False)):
            quantizer = Quantizer(kind, 8, torch.zeros(1))
            nn.init.constant_(quantizer.alpha, 0.7)
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            levels, alpha = quantizer(x)
            (levels * alpha).sum().backward()
            plain = torch.tensor(0.7, requires_grad=True)
            (to_levels(x, plain, None, kind) * plain).sum().backward()
            factor = 1 / math.sqrt(x.numel() * kind.highest)
            assert float(quantizer.alpha.grad) == pytest.approx(float(plain.grad) * factor, rel=1e-5)  # type: ignore[arg-type]
    x = torch.ones(3, requires_grad=True)
    scaled_gradient(x, 0.25).sum().backward()
    assert x.grad.tolist() == [0.25] * 3  # type: ignore[union-attr]


def test_weights_become_signs_and_a_scale() -> None:
    weight = torch.tensor([[0.5, -0.25, 0.125], [0.375, 0.0, -0.75]], requires_grad=True)  # exact, as their means
    signs, scale = binarized(weight)
    assert signs.tolist() == [[1, -1, 1], [1, 1, -1]]  # the mean is 0; what lies on it is +1
    assert float(scale) == pytest.approx(2 / 6)
    (signs * scale * torch.arange(6.0).view(2, 3)).sum().backward()
    assert weight.grad.tolist() == [[0, 1, 2], [3, 4, 5]]  # type: ignore[union-attr]  # straight through, no window
    signs, scale = binarized(weight, rows=True)
    assert signs.tolist() == [[1, -1, 1], [1, 1, -1]]  # means 0.125, which the third reaches, and -0.125
    assert scale.tolist() == pytest.approx([0.875 / 3, 1.125 / 3])


@pytest.mark.parametrize("rows", [False, True])
def test_what_is_binary_stays_as_it_is(rows: bool) -> None:
    weight = torch.randn(50, 70, generator=torch.Generator().manual_seed(0)) * 0.037 + 0.02
    weight[3] = 0.5  # a row of equal weights
    signs, scale = binarized(weight, rows=rows)
    again, same = binarized(signs * (scale[:, None] if rows else scale), rows=rows)
    assert torch.equal(signs, again)
    assert torch.equal(scale, same)


def test_first_scales() -> None:
    x = torch.tensor([-1.0, 0.0, 0.5, 0.5])  # mean |x| = ½
    assert float(first_alpha(x, Levels(1, True), "mean")) == 1.0
    assert float(first_alpha(x.abs(), Levels(1, False), "mean")) == 2.0
    assert float(first_alpha(x, Levels(4, True), "mean")) == pytest.approx(1 / math.sqrt(7))
    assert float(first_alpha(x.abs(), Levels(2, False), "mean")) == pytest.approx(2 / math.sqrt(3))
    assert float(first_alpha(x, Levels(1, True), "analytic")) == 0.5
    assert float(first_alpha(x.abs(), Levels(1, False), "analytic")) == pytest.approx(2 / 3)  # of 1, ½ and ½
    assert float(first_alpha(torch.full((4,), 0.1), Levels(1, False), "analytic")) == pytest.approx(0.4)  # as "mean"
    x = torch.randn(10_000, generator=torch.Generator().manual_seed(0))
    found = float(first_alpha(x, Levels(1, True), "search"))
    assert found == pytest.approx(float(x.abs().mean()), rel=0.05)  # where ‖x - α sgn x‖ is least

    def error(alpha: float) -> float:
        a = torch.tensor(alpha)
        return float((x - a * to_levels(x, a, None, Levels(4, True))).square().sum())

    best = float(first_alpha(x, Levels(4, True), "search"))
    assert all(error(best) <= error(other) for other in (0.1, 0.2, 0.3, 0.5, 1.0))
    assert float(first_alpha(torch.zeros(3), Levels(1, True), "mean")) == pytest.approx(1e-5)


def test_a_channel_of_outliers_leaves_the_others_alive() -> None:
    """One of 384 channels at 25 times the others' size, as behind MiniLM's last norm: with 2 bits least squares alone
    chooses its size for a scale, and rounds all others to 0. With more bits it decides."""
    x = torch.randn(200, 384, generator=torch.Generator().manual_seed(0)) * 0.25
    x[:, 7] = 6.35
    others = torch.arange(384) != 7
    for bits, least, most in ((1, 0.19, 0.23), (2, 0.25, 0.4), (4, 0.5, 0.7), (8, 0.04, 0.06)):
        alpha = float(first_alpha(x, Levels(bits, True), "search"))
        assert least < alpha < most
        zeros = to_levels(x, torch.tensor(alpha), None, Levels(bits, True))[:, others].eq(0).float().mean()
        assert float(zeros) <= 0.88


def test_values_that_are_nearly_all_zero_have_a_scale() -> None:
    x = torch.zeros(1000)
    x[:5] = torch.tensor([1.0, -1.0, 2.0, 1.5, 0.5])
    assert 0.1 < float(first_alpha(x, Levels(2, True), "search")) < 2


@pytest.mark.parametrize("count", [1, 63, 64, 65, 127, 768])
def test_words_hold_bits(count: int) -> None:
    bits = torch.rand(3, 5, count, generator=torch.Generator().manual_seed(count)) > 0.5
    words = packed(bits)
    assert words.shape == (3, 5, -(-count // 64))
    assert words.dtype == torch.int64
    assert torch.equal(unpacked(words, count), bits)
    assert torch.equal(packed(unpacked(words, count)), words)
    turned = bits.transpose(0, 1)  # not contiguous
    assert torch.equal(packed(turned), words.transpose(0, 1))


def test_the_first_bit_is_the_lowest() -> None:
    assert packed(torch.tensor([True, False, True])).tolist() == [5]
    top = torch.zeros(64, dtype=torch.bool)
    top[63] = True
    assert packed(top).tolist() == [-(2**63)]
    assert packed(torch.zeros(0, 70, dtype=torch.bool)).shape == (0, 2)


def test_a_binary_map_by_hand() -> None:
    linear = nn.Linear(2, 2)
    with torch.no_grad():
        linear.weight.copy_(torch.tensor([[0.5, -0.5], [-0.25, 0.75]]))
        linear.bias.copy_(torch.tensor([1.0, -1.0]))
    linear.__class__ = BinaryLinear
    linear.rows = False  # type: ignore[assignment]
    linear.input_bits = Quantizer(Levels(1, True), 2, linear.weight)
    nn.init.constant_(linear.input_bits.alpha, 3.0)
    nn.init.constant_(linear.input_bits.shift, 0.5)  # type: ignore[arg-type]
    # centre 0.125, s = 0.5, signs [[1, -1], [-1, 1]]; x - ½ = (½, -1½) → (1, -1), times 3
    with torch.no_grad():
        assert linear(torch.tensor([1.0, -1.0])).tolist() == [1 + 2 * 3 * 0.5, -1 - 2 * 3 * 0.5]
        linear.weight.mul_(2)  # noticed though signs are kept between calls
        assert linear(torch.tensor([1.0, -1.0])).tolist() == [7, -7]


def test_rows_of_an_embedding_have_two_values() -> None:
    table = nn.Embedding(5, 6)
    table.__class__ = BinaryEmbedding
    ids = torch.tensor([[0, 3], [4, 0]])
    rows = table(ids)
    assert rows.shape == (2, 2, 6)
    assert rows[0, 0].abs().unique().numel() == 1
    assert float(rows[0, 0, 0].detach().abs()) == pytest.approx(float(table.weight[0].detach().abs().mean()))
    rows.sum().backward()
    assert table.weight.grad[:, 0].tolist() == [2, 0, 0, 1, 1]  # type: ignore[union-attr]


def test_attention_by_hand() -> None:
    """Two tokens, one head of width 2, scores of ±α_q α_k · scaling; a probability counts from half of its α on."""
    like = torch.zeros(1)
    bits = AttentionBits({n: Levels(1, n != "probs") for n in ("query", "key", "value", "probs")}, like)
    for name, alpha in (("query", 0.5), ("key", 2.0), ("value", 3.0), ("probs", 0.8)):
        nn.init.constant_(bits.of(name).alpha, alpha)
    query = torch.tensor([[[[0.3, 0.1], [-0.2, 0.0]]]])  # signs (1, 1) and (-1, 1)
    key = torch.tensor([[[[1.0, 5.0], [-1.0, -5.0]]]])  # (1, 1) and (-1, -1)
    value = torch.tensor([[[[1.0, -1.0], [0.5, 2.0]]]])  # (1, -1) and (1, 1)
    with torch.no_grad():
        context, probabilities = bits(query, key, value, None, 0.0, 0.5)
    # scores: query 0: (2, -2) · 0.5 · 2 · 0.5 = (1, -1); query 1: 0, 0
    high = 1 / (1 + math.exp(-2))
    assert torch.allclose(probabilities, torch.tensor([[[[high, 1 - high], [0.5, 0.5]]]], dtype=torch.float64))
    # levels of the probabilities: 0.88 is 1, 0.12 is 0; 0.5 is above 0.4, so 1 and 1
    wanted = 0.8 * 3.0 * torch.tensor([[[[1.0, -1.0], [2.0, 0.0]]]])
    assert torch.allclose(context, wanted)
    masked, _ = bits(query, key, value, torch.tensor([[[[True, False]]]]), 0.0, 0.5)
    assert torch.allclose(masked, 0.8 * 3.0 * torch.tensor([[[[1.0, -1.0], [1.0, -1.0]]]]))


def test_dropout_comes_before_probabilities_are_rounded() -> None:
    """0.5 / (1 - 0.6) is 1.25: at α = 2 it reaches the half of α, which 0.5 does not (spec 2.1)."""
    like = torch.zeros(1)
    bits = AttentionBits({n: Levels(1, n != "probs") for n in ("query", "key", "value", "probs")}, like)
    for quantizer in bits.values():
        nn.init.constant_(quantizer.alpha, 1.0)  # type: ignore[arg-type]
    nn.init.constant_(bits.of("probs").alpha, 2.0)
    zeros = torch.zeros(1, 1, 2, 2)
    torch.manual_seed(0)
    with torch.no_grad():
        dropped = torch.stack([bits.train()(zeros, zeros, zeros, None, 0.6, 1.0)[0] for _ in range(20)])
        kept, _ = bits.eval()(zeros, zeros, zeros, None, 0.6, 1.0)
    assert float(kept.abs().max()) == 0
    assert set(dropped.unique().tolist()) == {0.0, 2.0, 4.0}
