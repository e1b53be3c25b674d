"""The same model on whole numbers: products of packed words by XOR, AND and popcount (spec 8.2 to 8.4).

The reference that fast kernels are tested against, and the proof that a binary model needs no float products. It is
written for clarity, not for speed.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from secateur.bits.modules import AttentionBits, BinaryLinear, Dropout, is_binary, masked
from secateur.bits.packing import packed
from secateur.bits.quantizers import LEAST_ALPHA, Levels, to_levels
from secateur.errors import SecateurError
from secateur.families import sites

CHUNK = 1 << 22  # words at a time
EXACT = 1 << 24  # whole numbers up to here are exact in float32

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class Operand:
    """Levels in words: one plane of bits for signs ±1, else one for each bit, the top one negative if signed.

    Attributes:
        planes: weight and words, (..., rows, ⌈K/64⌉), of each plane.
        is_sign: whether bits mean ±1 instead of 0 and 1.
        count: K, the levels in a row.
    """

    planes: tuple[tuple[int, Tensor], ...]
    is_sign: bool
    count: int

    @classmethod
    def of(cls, values: Tensor, levels: Levels) -> Operand:
        """Pack levels, (..., rows, K)."""
        if levels.is_sign:
            return cls(((1, packed(values > 0)),), True, values.shape[-1])
        whole = values.to(torch.int64)
        planes = []
        for place in range(levels.bits):
            top = levels.signed and place == levels.bits - 1
            planes.append((-(2**place) if top else 2**place, packed((whole >> place) & 1 == 1)))
        return cls(tuple(planes), False, values.shape[-1])


def popcount(words: Tensor) -> Tensor:
    """Ones in each row of words: (..., W) → (...) int64."""
    unsigned = words.numpy().view(np.uint64)  # of negative numbers numpy counts the ones of what they are without sign
    return torch.from_numpy(np.bitwise_count(unsigned).sum(axis=-1, dtype=np.int64))


def product(a: Operand, b: Operand) -> Tensor:
    """A Bᵀ in whole numbers: (..., M, K) and (..., N, K) → (..., M, N) int64.

    (±1)·(±1) = K - 2 pc(a ⊕ b); {0, 1}·(±1) = 2 pc(a ∧ b) - pc(a); {0, 1}·{0, 1} = pc(a ∧ b); planes add up.
    """
    if a.is_sign and b.is_sign:
        return a.count - 2 * _counts(torch.bitwise_xor, a.planes[0][1], b.planes[0][1])
    total = torch.zeros((), dtype=torch.int64)
    for of_a, words_a in a.planes:
        for of_b, words_b in b.planes:
            both = _counts(torch.bitwise_and, words_a, words_b)
            if b.is_sign:
                both = 2 * both - popcount(words_a)[..., :, None]
            elif a.is_sign:
                both = 2 * both - popcount(words_b)[..., None, :]
            total = total + of_a * of_b * both
    return total


def _counts(operation: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor) -> Tensor:
    """Popcount of every row of a with every row of b, some rows at a time."""
    rows = max(1, CHUNK // max(1, b.numel()))
    parts = [popcount(operation(part[..., :, None, :], b[..., None, :, :])) for part in a.split(rows, dim=-2)]
    return torch.cat(parts, dim=-1 - 1)


def thresholds(bit: Callable[[Tensor], Tensor], lowest: int, highest: int, shape: tuple[int, ...]) -> Tensor:
    """The least whole number at which a bit is set, found by halving: an integer in place of a float epilogue.

    Args:
        bit: from whole numbers of a shape to whether the bit is set; it never goes off again as they rise.
        lowest: no number is below it.
        highest: no number is above it.
        shape: of the numbers, such as one for each channel.

    Returns:
        int64, of the shape; highest + 1 where the bit is never set.
    """
    low, high = torch.full(shape, lowest), torch.full(shape, highest + 1)
    while bool((low < high).any()):
        middle = (low + high).div(2, rounding_mode="floor")
        found = bit(middle)
        low, high = torch.where(found | (low >= high), low, middle + 1), torch.where(found, middle, high)
    return low


class PackedLinear(BinaryLinear):
    """A `BinaryLinear` on words. It may hand on levels, by integer thresholds, instead of floats."""

    words: Operand
    scale: Tensor
    hands_on: Tensor | None  # thresholds of its outputs, if all that reads them is a quantiser of one bit
    signed: bool  # whether those levels are ±1, or 0 and 1
    takes_levels: bool

    def forward(self, input: Tensor) -> Tensor:
        """As `BinaryLinear`, from levels if an earlier one hands them on."""
        quantizer = self.input_bits
        levels = input if self.takes_levels else quantizer(input)[0]
        rows = Operand.of(levels.flatten(0, -2), quantizer.levels)
        whole = product(rows, self.words).view(*input.shape[:-1], self.out_features)
        if self.hands_on is None:
            return self.epilogue(whole)
        return levels_of(whole >= self.hands_on, self.signed)

    def epilogue(self, whole: Tensor) -> Tensor:
        """Floats from whole numbers, (..., out), by the very operations of the float simulation."""
        scaled = whole.to(self.weight.dtype) * (self.input_bits.alpha.clamp_min(LEAST_ALPHA) * self.scale)
        return scaled if self.bias is None else scaled + self.bias

    @property
    def bounds(self) -> tuple[int, int]:
        """Between which whole numbers its products lie."""
        levels = self.input_bits.levels
        most = self.in_features * max(-levels.lowest, levels.highest)
        return -most, most


class PackedAttention(AttentionBits):
    """`AttentionBits` on words; queries, keys and values of one bit come as levels."""

    handed: dict[str, bool]
    hands_on: Tensor | None  # thresholds of the context, (heads, 1, head width)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: Dropout, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """As `AttentionBits`; a head whose operands have one bit looks its exponentials up."""
        given = {"query": query, "key": key, "value": value}
        levels = {n: x if self.handed[n] else self.of(n)(x)[0] for n, x in given.items()}
        alpha = {n: self.of(n).alpha.clamp_min(LEAST_ALPHA) for n in self}
        operand = {n: Operand.of(levels[n], self.of(n).levels) for n in ("query", "key")}
        whole = product(operand["query"], operand["key"])
        factor = alpha["query"] * alpha["key"] * scaling
        keep = kept(mask)
        one_bit = operand["query"].is_sign and operand["key"].is_sign and self.of("probs").levels == Levels(1, False)
        if one_bit and (mask is None or keep is not None):
            exponentials = by_table(whole, query.shape[-1], factor, keep)
            probabilities = exponentials / exponentials.sum(dim=-1, keepdim=True)
            p = bits_by_table(exponentials, alpha["probs"])
        else:
            probabilities = masked(whole.to(query.dtype) * factor, mask).softmax(dim=-1, dtype=torch.float64)
            p = self.of("probs")(probabilities)[0]
        probabilities = self.dropped(probabilities, dropout)  # the same: in training there is no twin
        values = Operand.of(levels["value"].transpose(-1, -2), self.of("value").levels)
        context = product(Operand.of(p, self.of("probs").levels), values)
        if self.hands_on is not None:
            return levels_of(context >= self.hands_on, True), probabilities
        return context.to(query.dtype) * (alpha["probs"] * alpha["value"]), probabilities


def levels_of(bits: Tensor, signed: bool) -> Tensor:
    """Bits as floats ±1, or 0 and 1."""
    return torch.where(bits, 1.0, -1.0 if signed else 0.0)


def kept(mask: Tensor | None) -> Tensor | None:
    """A mask as True where a query may look; None if there is none, or it adds something else than 0 or nothing."""
    if mask is None or mask.dtype == torch.bool:
        return mask
    return mask == 0 if bool(((mask == 0) | (mask <= -1e4)).all()) else None


def by_table(whole: Tensor, width: int, factor: Tensor, keep: Tensor | None) -> Tensor:
    """Exponentials of scores, from products of signs: they take width + 1 values, which are looked up (spec 8.4).

    Args:
        whole: products, (..., queries, keys), of rows of `width` signs.
        width: the head width.
        factor: what a product is multiplied by to be a score.
        keep: True where a query may look; everywhere if None.

    Returns:
        T[d], float64, of the products' shape; 0 where a query may not look.
    """
    scores = torch.arange(-width, width + 1, 2).to(factor.dtype) * factor
    table = (scores.double() - scores.double().max()).exp()
    exponentials = table[(whole + width) // 2]
    if keep is not None:
        exponentials = exponentials * keep + ~keep.any(dim=-1, keepdim=True)  # looking at nothing, a softmax is even
    return exponentials


def bits_by_table(exponentials: Tensor, alpha: Tensor) -> Tensor:
    """Which probabilities reach α/2, without a softmax: T[d] ≥ (α/2) Z, Z being the sum of a row's T[d].

    Args:
        exponentials: T[d], (..., queries, keys), float64.
        alpha: of the probabilities.

    Returns:
        0 or 1, float32, of the exponentials' shape.
    """
    return (exponentials >= 0.5 * alpha.double() * exponentials.sum(dim=-1, keepdim=True)).float()


def packed_twin(model: Model) -> Model:
    """A copy of a binarized model that multiplies packed words instead of floats, with the same outputs.

    Outputs that only a 1-bit quantiser reads (queries, keys, values, the context, what enters the second map of the
    feed-forward block) are compared with integer thresholds and never become floats.

    Args:
        model: a binarized model, calibrated, on a CPU.

    Returns:
        A model for evaluation.

    Raises:
        SecateurError: the model is not binary.
    """
    if not is_binary(model):
        raise SecateurError("This model is not binary: make it so with secateur.binarize.")
    twin = copy.deepcopy(model).eval().requires_grad_(False)
    for module in twin.modules():
        if isinstance(module, BinaryLinear):
            module.__class__ = PackedLinear
            signs, scale = module.signs()
            words = Operand.of(signs, Levels(1, True))
            module.__dict__ |= {"words": words, "scale": scale, "hands_on": None, "takes_levels": False, "signed": True}
        elif isinstance(module, AttentionBits):
            module.__class__ = PackedAttention
            module.__dict__ |= {"handed": dict.fromkeys(module, False), "hands_on": None}
    with torch.no_grad():
        for site in sites(twin).heads:
            _fold_attention([module for module, _ in site.cuts], site.module, site.width)
        for site in sites(twin).neurons:
            if len(site.cuts) == 2:
                _fold(site.cuts[0][0], site.output)
    return twin


def _fold_attention(maps: list[nn.Module], module: nn.Module, width: int) -> None:
    """Integer thresholds for what the maps hand to attention, and attention to the last map."""
    bits = getattr(module, "attention_bits", None)
    if not isinstance(bits, PackedAttention):
        return
    *into, output = maps
    for name, linear in zip(("query", "key", "value"), into, strict=True):
        quantizer = bits.of(name)
        if isinstance(linear, PackedLinear) and quantizer.levels.is_sign:
            linear.hands_on = _channel_thresholds(linear, lambda z: z >= 0)
            bits.handed[name] = True
    if isinstance(output, PackedLinear) and output.input_bits.levels.is_sign:
        quantizer = output.input_bits
        factor = bits.of("probs").alpha.clamp_min(LEAST_ALPHA) * bits.of("value").alpha.clamp_min(LEAST_ALPHA)

        def bit(whole: Tensor) -> Tensor:
            return to_levels(whole.to(factor.dtype) * factor, factor, quantizer.shift, quantizer.levels) > 0

        found = thresholds(bit, -EXACT, EXACT, (output.in_features,))
        bits.hands_on = found.view(-1, 1, width)
        output.takes_levels = True


def _fold(first: nn.Module, second: nn.Module) -> None:
    """Integer thresholds between the maps of a feed-forward block with a ReLU: the neurons never become floats."""
    if not (isinstance(first, PackedLinear) and isinstance(second, PackedLinear)):
        return
    quantizer = second.input_bits
    if quantizer.levels != Levels(1, False):  # signed: there may be another activation between them
        return
    alpha = quantizer.alpha.clamp_min(LEAST_ALPHA)
    first.hands_on = _channel_thresholds(
        first, lambda z: to_levels(z.relu(), alpha, quantizer.shift, quantizer.levels) > 0
    )
    first.signed, second.takes_levels = False, True


def _channel_thresholds(linear: PackedLinear, bit: Callable[[Tensor], Tensor]) -> Tensor:
    return thresholds(lambda whole: bit(linear.epilogue(whole)), *linear.bounds, (linear.out_features,))
