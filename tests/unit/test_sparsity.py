"""Prior, schedule, selection and storage of sparse weights, against hand-computed values."""

from __future__ import annotations

import math

import pytest
import torch

from secateur.errors import InvalidModel, SecateurError
from secateur.sparsity.prior import MixturePrior, spike_for
from secateur.sparsity.schedule import CubicSchedule, annealed_slab, annealed_strength
from secateur.sparsity.selection import Blocks, NofM, Units, choose, kth_smallest, pattern_of
from secateur.sparsity.storage import decode, encode, packed_bits, unpacked_bits
from secateur.train import PruningSettings

SINGLE = Blocks()
MNLI = CubicSchedule(start=12_272, end=98_175, interval=100, initial=0.3, final=0.9)


@pytest.mark.parametrize(
    ("slab_share", "spike", "slab", "threshold", "steepest", "at", "far"),
    [
        (1e-7, 1e-12, 0.1, 7.587136e-6, 6.9145e6, 7.056e-6, 0.4),
        (0.1, 1e-10, 0.05, 4.942122e-5, 4.0906e5, 4.322e-5, 0.8),
        (1e-4, 1e-10, 0.05, 6.200855e-5, 5.4442e5, 5.622e-5, 0.8),
        (0.1, 1e-9, 0.05, 1.487346e-4, 1.2118e5, 1.289e-4, 0.8),
        (0.1, 1e-9, 0.1, 1.510468e-4, 1.2369e5, 1.313e-4, 0.4),
    ],
)
def test_prior_against_the_table(
    slab_share: float, spike: float, slab: float, threshold: float, steepest: float, at: float, far: float
) -> None:
    prior = MixturePrior(slab_share, spike, slab)
    assert prior.threshold == pytest.approx(threshold, rel=1e-6)
    w = torch.tensor([prior.threshold, at, 0.04], dtype=torch.float64)
    assert float(prior.spike_probability(w[:1].square())) == pytest.approx(0.5)
    assert prior.pull(w[1:]).tolist() == pytest.approx([steepest, far], rel=1e-4)
    grid = torch.linspace(1e-7, 3 * threshold, 20001, dtype=torch.float64)
    assert float(prior.pull(grid).max()) == pytest.approx(steepest, rel=1e-4)
    assert float(grid[prior.pull(grid).argmax()]) == pytest.approx(at, rel=2e-3)


def test_prior_is_the_gradient_of_its_logarithm() -> None:
    prior = MixturePrior(0.1, 1e-2, 0.5)
    w = torch.linspace(-1, 1, 41, dtype=torch.float64)

    def log_density(x: torch.Tensor) -> torch.Tensor:
        parts = [(0.1, 0.5), (0.9, 1e-2)]
        return sum(p * torch.exp(-x.square() / (2 * v)) / math.sqrt(2 * math.pi * v) for p, v in parts).log()  # type: ignore[union-attr]

    slope = -(log_density(w + 1e-6) - log_density(w - 1e-6)) / 2e-6
    torch.testing.assert_close(prior.pull(w), slope, rtol=1e-6, atol=1e-6)


def test_prior_over_the_rows_of_mnli() -> None:
    w = torch.tensor([1e-6, 1e-5, 2e-5, 4e-5, 5e-5, 6e-5, 1e-3, 0.04], dtype=torch.float64)
    added = MixturePrior(0.1, 1e-10, 0.05).pull(w) / 392_702
    wanted = [2.546447e-2, 2.546439e-1, 5.092733e-1, 1.003717, 5.456594e-1, 4.668595e-3, 5.092920e-8, 2.037168e-6]
    assert added.tolist() == pytest.approx(wanted, rel=1e-6)


def test_prior_at_its_ends() -> None:
    prior = MixturePrior(0.1, 1e-10, 0.05)
    w = torch.tensor([-10.0, -1e-4, 0.0, 1e-4, 10.0])
    pull = prior.pull(w)
    assert bool(pull.isfinite().all())
    torch.testing.assert_close(pull, -pull.flip(0))
    assert float(pull[2]) == 0
    half = prior.pull(torch.tensor([1e-5], dtype=torch.float16))  # w² would vanish in half precision
    assert half.dtype == torch.float32
    assert float(half) == pytest.approx(float(torch.tensor(1e-5, dtype=torch.float16)) / 1e-10, rel=1e-3)
    x = torch.tensor([1e-5], dtype=torch.float64)
    assert float(MixturePrior(1 - 1e-12, 1e-4, 0.05).pull(x)) == pytest.approx(1e-5 / 0.05, rel=1e-6)
    assert float(MixturePrior(1e-12, 1e-4, 0.05).pull(x)) == pytest.approx(1e-5 / 1e-4, rel=1e-6)
    flat = MixturePrior(0.3, 0.05, 0.05)
    assert float(flat.pull(x)) == pytest.approx(1e-5 / 0.05)
    assert flat.threshold == 0
    with pytest.raises(SecateurError, match="0 < spike <= slab, not 0.1 and 0.05"):
        MixturePrior(0.1, 0.1, 0.05)
    with pytest.raises(SecateurError, match="share lies between 0 and 1, not at 1"):
        MixturePrior(1.0, 1e-9, 0.05)


def test_prior_of_a_group_is_half_way_where_its_densities_meet() -> None:
    prior = MixturePrior(0.2, 0.01, 1.0, group=4)
    r = prior.threshold
    # λ v1^(-m/2) exp(-r²/(2 v1)) = (1-λ) v0^(-m/2) exp(-r²/(2 v0))
    assert 0.2 * math.exp(-(r**2) / 2) == pytest.approx(0.8 * 0.01**-2 * math.exp(-(r**2) / 0.02))
    weights = torch.full((1, 4), r / 2, dtype=torch.float64)
    pull = prior.pull(weights, weights.square().sum(dim=1, keepdim=True))
    torch.testing.assert_close(pull, weights * (0.5 / 0.01 + 0.5 / 1.0))


def test_schedule_of_mnli() -> None:
    steps = [12_272, 20_862, 33_747, 55_223, 76_699, 89_584, 98_175]
    wanted = [0.3, 0.462595, 0.646866, 0.824997, 0.890625, 0.899400, 0.9]
    assert [MNLI.sparsity(t) for t in steps] == pytest.approx(wanted, abs=1e-6)
    slabs = [0.1, 9.001035e-2, 7.502587e-2, 5.005058e-2, 2.507529e-2, 1.009081e-2, 1e-4]
    assert [annealed_slab(0.1, 0.001, MNLI, t) for t in steps] == pytest.approx(slabs, rel=1e-6)
    assert (MNLI.sparsity(12_271), MNLI.sparsity(98_176)) == (0.0, 0.9)
    assert annealed_slab(0.1, 0.001, MNLI, 0) == 0.1
    chosen = [t for t in range(98_176) if MNLI.chooses(t)]
    assert len(chosen) == 1 + (98_174 // 100 - 12_272 // 100) + 1
    assert (chosen[0], chosen[1], chosen[-1]) == (12_272, 12_300, 98_175)


def test_schedule_without_room() -> None:
    with pytest.raises(SecateurError, match="no room: it would begin at step 5 and end at step 5"):
        CubicSchedule(5, 5, 1, 0.3, 0.9)
    with pytest.raises(SecateurError, match="sparsity lies between 0 and 1, not at 1"):
        CubicSchedule(0, 5, 1, 0.3, 1.0)
    with pytest.raises(SecateurError, match="first sparsity"):
        CubicSchedule(0, 5, 1, 0.5, 0.4)


def test_annealed_strength_rises_and_stays() -> None:
    assert [annealed_strength(10, 20, t) for t in (0, 10, 15, 20, 30)] == [0, 0, 0.5, 1, 1]
    assert annealed_strength(0, 0, 0) == 1


def test_kth_smallest_is_exact_over_tensors_and_types() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1000, generator=generator), torch.randn(30, 40, generator=generator) * 1e-20]
    tensors.append(torch.tensor([0.0, -0.0, 1e30, -1e30]))
    ranked = torch.cat([tensor.reshape(-1) for tensor in tensors]).sort().values
    for k in (1, 2, 700, 1102, 1103, 2203, 2204):
        assert kth_smallest(tensors, k) == float(ranked[k - 1])
    halves = [torch.randn(500, generator=generator).to(torch.bfloat16)]
    assert kth_smallest(halves, 77) == float(halves[0].sort().values[76])
    with pytest.raises(SecateurError, match="There is no 5th of 4 values"):
        kth_smallest(tensors[2:], 5)
    with pytest.raises(SecateurError, match="not a finite number"):
        kth_smallest([torch.tensor([1.0, math.nan])], 1)


def test_kth_smallest_where_a_sample_misleads() -> None:
    values = torch.arange(6400.0)
    values[::64] = 1e6  # all that is sampled
    assert kth_smallest([values], 3000) == float(values.sort().values[2999])
    values = torch.cat([torch.zeros(10_000), torch.arange(1.0, 101.0)])
    assert [kth_smallest([values], k) for k in (1, 10_000, 10_001, 10_100)] == [0, 0, 1, 100]


def test_equal_scores_go_in_order_until_there_are_enough() -> None:
    scores = [torch.tensor([[1.0, 2.0], [2.0, 2.0]]), torch.tensor([[2.0, 0.5], [3.0, 2.0]])]
    one, other = choose(scores, 0.5, Blocks())  # k = 4: 0.5 and 1, and the first of the 2s
    assert one.tolist() == [[False, False], [True, True]]
    assert other.tolist() == [[True, False], [True, True]]
    halves = [torch.randn(64, 64, generator=torch.Generator().manual_seed(0)).half()]
    assert int((~choose(halves, 0.9, Blocks())[0]).sum()) == int(4096 * 0.9) - 1
    (floor,) = choose([torch.ones(10, 10)], 0.99, Blocks(), floor=0.1)
    assert int(floor.sum()) == 10


def test_kth_smallest_beyond_2_to_the_24() -> None:
    n = 2**24 + 3
    values = torch.arange(n, dtype=torch.int32).float()  # the last ones are rounded to even numbers
    assert kth_smallest([values], 12_345_678) == 12_345_677
    assert kth_smallest([values, values], n) == float(values[(n - 1) // 2])


def test_single_weights_are_ranked_together() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randperm(100_000, generator=generator).float().add(1).view(100, 1000)
    (mask,) = choose([weight], 0.9, SINGLE)
    assert int((~mask).sum()) == 89_999
    assert float(weight[mask].min()) == 90_000
    pruned = weight * mask
    (again,) = choose([pruned], 0.5, SINGLE)
    assert bool(again.all())  # more zeros than that are there: the threshold is 0
    one, two = weight[:50], weight[50:]
    torch.testing.assert_close(torch.cat(choose([one, two], 0.9, SINGLE)), mask)
    first = choose([one, two], 0.5, SINGLE)[0]
    scaled = choose([one, 10 * two], 0.5, SINGLE)[0]
    assert int(scaled.sum()) < int(first.sum())  # ranking is global


def test_a_floor_keeps_a_share_of_each_matrix() -> None:
    small, large = torch.rand(10, 100) * 0.01, torch.rand(10, 100) + 1
    low, high = choose([small, large], 0.8, SINGLE)
    assert (int(low.sum()), int(high.sum())) == (0, 401)
    low, high = choose([small, large], 0.8, SINGLE, floor=0.05)
    assert (int(low.sum()), int(high.sum())) == (50, 351)
    assert float(small[low].min()) >= float(small[~low].max())


@pytest.mark.parametrize(
    ("threshold", "slab_share", "slab", "spike"),
    [(1.510468e-4, 0.1, 0.1, 1e-9), (4.942122e-5, 0.1, 0.05, 1e-10), (7.587136e-6, 1e-7, 0.1, 1e-12)],
)
def test_the_spike_of_a_threshold(threshold: float, slab_share: float, slab: float, spike: float) -> None:
    assert spike_for(threshold, slab_share, slab) == pytest.approx(spike, rel=1e-5)


def test_a_threshold_that_no_spike_has() -> None:
    for threshold in (0.0, 5.0):
        with pytest.raises(SecateurError, match="lower lr"):
            spike_for(threshold, 0.1, 0.1)


def test_the_usual_spike_follows_the_learning_rate() -> None:
    settings = PruningSettings()
    assert settings.mixture(5e-5).threshold == pytest.approx(7.5e-5)
    assert settings.mixture(5e-4).threshold == pytest.approx(7.5e-4)
    assert PruningSettings(spike=1e-9).mixture(5e-4).spike == 1e-9


def test_blocks_go_by_the_root_of_their_mean_square() -> None:
    weight = torch.tensor([[3.0, 0, 1, 1], [0, 4, 1, 1], [0, 0, 0, 2], [0, 0, 0, 0]])
    blocks = Blocks(2, 2)
    torch.testing.assert_close(blocks.units(weight), torch.tensor([[2.5, 1], [0, 1]]))
    torch.testing.assert_close(blocks.squares(weight)[:, [0, 2]], torch.tensor([[25.0, 4], [25, 4], [0, 4], [0, 4]]))
    (mask,) = choose([weight], 0.5, blocks)
    assert mask.tolist() == [[True] * 4] * 2 + [[False, False, True, True]] * 2
    assert Blocks(3, 2).fits(weight.shape) is False


def test_units_with_negative_scores_go_first() -> None:
    """As movement has them: weights that training draws to zero."""
    score = torch.tensor([[-10.0, -10, 1, 1], [-10, -10, 1, 1]])
    torch.testing.assert_close(Blocks(2, 2).units(score), torch.tensor([[-10.0, 1]]))
    runs = torch.tensor([[-10.0, -9, 5, 6, -1, -0.5, 5, 6]])
    torch.testing.assert_close(NofM(2, 4).units(runs), torch.tensor([[-(181**0.5), -(1.25**0.5)]]))


def test_two_of_four() -> None:
    weight = torch.tensor([[1.0, 2, 3, 4, 8, 7, 6, 5]])
    pattern = NofM(2, 4)
    torch.testing.assert_close(pattern.units(weight), torch.tensor([[5**0.5, 61**0.5]]))
    assert choose([weight], 0.5, pattern)[0].tolist() == [[False, False, True, True, True, True, False, False]]
    # a quarter of the weights: the run that loses less is bound, once the threshold passes it
    rows = torch.cat([weight, 10 * weight])
    kept = choose([rows], 0.26, pattern)[0]
    assert kept.sum(dim=1).tolist() == [6, 8]
    assert int(choose([rows], 0.5, pattern)[0].sum()) == 8


@pytest.mark.parametrize("text", ["4:2", "0x4", "dense", "2:4:8", ""])
def test_patterns_that_cannot_be_read(text: str) -> None:
    with pytest.raises(SecateurError, match="A pattern is '1x1'"):
        pattern_of(text)


def test_patterns_by_name() -> None:
    assert pattern_of("16x4") == Blocks(16, 4)
    assert pattern_of("2:4") == NofM(2, 4)
    assert (pattern_of("1x1").most, pattern_of("2:4").most) == (1.0, 0.5)
    assert pattern_of("heads") == Units("heads")
    assert pattern_of("units").kinds == ("heads", "neurons")  # type: ignore[union-attr]


def test_bits_are_packed_from_the_lowest() -> None:
    mask = torch.tensor([True, False, True, True, False, False, False, False, True])
    assert packed_bits(mask).tolist() == [1 + 4 + 8, 1]
    assert unpacked_bits(packed_bits(mask), 9).tolist() == mask.tolist()


@pytest.mark.parametrize("block", [(1, 1), (2, 4), (4, 2)])
def test_storage_takes_bits_and_values(block: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 12, generator=generator)
    rows, columns = block
    blocks = torch.rand(8 // rows, 12 // columns, generator=generator) < 0.3
    weight *= blocks.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    parts = encode(weight, "fp32", block)
    assert parts["values"].numel() == int(blocks.sum()) * rows * columns
    assert parts["mask"].numel() == -(-blocks.numel() // 8)
    assert torch.equal(decode(parts, (8, 12), torch.float32, block), weight)
    exact = decode(encode(weight, "bf16", block), (8, 12), torch.float32, block)
    assert torch.equal(exact, weight.bfloat16().float())
    int8 = decode(encode(weight, "int8", block), (8, 12), torch.float32, block)
    assert bool(((int8 - weight).abs() <= weight.abs().amax(dim=1, keepdim=True) / 254 + 1e-7).all())
    parts["values"] = parts["values"][:-1]
    with pytest.raises(InvalidModel, match="file is damaged"):
        decode(parts, (8, 12), torch.float32, block)
