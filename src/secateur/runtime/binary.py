"""Parts of a plan that a binary model has: maps with 1-bit weights, attention's levels, tables of few bits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from secateur.bits.modules import AttentionBits, BinaryEmbedding, BinaryLinear, Quantizer, RoundedEmbedding
from secateur.bits.packing import packed, unpacked
from secateur.bits.quantizers import LEAST_ALPHA, Levels, binarized, to_levels
from secateur.errors import InvalidModel
from secateur.sparsity.storage import int8_rows


@dataclass(frozen=True)
class Rounding:
    """How a row is rounded to levels (`bits.quantizers.to_levels`).

    Attributes:
        alpha: the scale, a float32 scalar.
        shift: taken from each channel, (channels,); 0 if None.
        levels: what it is rounded to.
    """

    alpha: Tensor
    shift: Tensor | None
    levels: Levels

    def __call__(self, x: Tensor) -> Tensor:
        return to_levels(x, self.alpha, self.shift, self.levels)


@dataclass(frozen=True)
class BinaryAffine:
    """A linear map with weights ±s and a rounded input: y = (levels · signsᵀ) · scale + bias.

    Attributes:
        words: signs, (out, ⌈in/64⌉) int64; bit 1 is +1.
        inputs: entries of a row.
        scale: α s of each output, (out,).
        bias: (out,); None if there is none.
        rounding: of the input.
    """

    words: Tensor
    inputs: int
    scale: Tensor
    bias: Tensor | None
    rounding: Rounding

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return len(self.words), self.inputs

    @cached_property
    def signs(self) -> Tensor:
        """±1, (out, in)."""
        return unpacked(self.words, self.inputs).float().mul_(2).sub_(1)

    def __call__(self, x: Tensor) -> Tensor:
        """The map by a float product of whole numbers, which is exact."""
        product = functional.linear(self.rounding(x), self.signs) * self.scale
        return product if self.bias is None else product + self.bias


@dataclass(frozen=True)
class ProductLevels:
    """Attention on rounded operands: roundings of queries, keys, values and probabilities."""

    query: Rounding
    key: Rounding
    value: Rounding
    probs: Rounding

    def factor(self, width: int) -> Tensor:
        """What whole products of queries and keys are multiplied by."""
        return self.query.alpha * self.key.alpha * width**-0.5

    @property
    def context(self) -> Tensor:
        """What whole products of probabilities and values are multiplied by."""
        return self.probs.alpha * self.value.alpha

    def probabilities(self, query: Tensor, key: Tensor, bias: Tensor | None) -> Tensor:
        """Levels of the probabilities, (1, heads, queries, keys) float64."""
        scores = self.query(query) @ self.key(key).transpose(-1, -2) * self.factor(query.shape[-1])
        return self.probs((scores if bias is None else scores + bias).softmax(dim=-1, dtype=torch.float64))

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None) -> Tensor:
        """Context, as `bits.modules.AttentionBits` computes it; all (1, heads, tokens, head width)."""
        return self.probabilities(query, key, bias).to(value.dtype) @ self.value(value) * self.context


@dataclass(frozen=True)
class Table:
    """Rows that ids look up.

    Attributes:
        values: (rows, width) float32 or int8, or (rows, ⌈width/64⌉) int64: signs, bit 1 is +1.
        scale: of each row, (rows,); None of float32.
        width: entries of a row.
    """

    values: Tensor
    scale: Tensor | None
    width: int

    def __len__(self) -> int:
        return len(self.values)

    @property
    def nbytes(self) -> int:
        """Bytes of rows and scales."""
        return self.values.nbytes + (0 if self.scale is None else self.scale.nbytes)

    def rounded(self) -> Table:
        """The table with rows of floats in 8 bits, each with its own scale."""
        return self if self.scale is not None else Table(*int8_rows(self.values), self.width)

    def __call__(self, ids: Tensor) -> Tensor:
        """Rows of ids, (..., width) float32."""
        rows = self.values[ids]
        if self.scale is None:
            return rows
        whole = unpacked(rows, self.width).float() * 2 - 1 if rows.dtype == torch.int64 else rows.float()
        return whole * self.scale[ids][..., None]


def is_split(modules: list[nn.Module], attention: nn.Module) -> bool:
    """Whether queries, keys and values come from maps with inputs of their own, or are rounded."""
    return any(isinstance(module, BinaryLinear) for module in modules) or levels_of(attention) is not None


@torch.no_grad()
def binary_affine(module: BinaryLinear) -> BinaryAffine:
    """A binary map, as it computes."""
    signs, scale = module.signs()
    rounding = _rounding(module.input_bits)
    whole = (rounding.alpha * scale.float()).expand(module.out_features)
    bias = None if module.bias is None else _copy(module.bias)
    return BinaryAffine(packed(signs > 0).contiguous(), module.in_features, _copy(whole), bias, rounding)


def levels_of(attention: nn.Module) -> ProductLevels | None:
    """Roundings of an attention's operands; None if it multiplies floats."""
    bits = getattr(attention, "attention_bits", None)
    if not isinstance(bits, AttentionBits):
        return None
    return ProductLevels(*(_rounding(bits.of(name)) for name in ("query", "key", "value", "probs")))


@torch.no_grad()
def table_of(module: nn.Module) -> Table:
    """A table of embeddings in the bits that it has."""
    weight = cast(Tensor, module.weight).detach()
    if isinstance(module, BinaryEmbedding):
        signs, scale = binarized(weight, rows=True)
        return Table(packed(signs > 0).contiguous(), _copy(scale), weight.shape[1])
    if isinstance(module, RoundedEmbedding):
        whole, scale = int8_rows(weight)
        return Table(whole.contiguous(), _copy(scale), weight.shape[1])
    return Table(_copy(weight), None, weight.shape[1])


def _rounding(quantizer: Quantizer) -> Rounding:
    if not bool(quantizer.alpha.isfinite()):
        raise InvalidModel("The activations of this model are not calibrated: call secateur.binarize first.")
    shift = None if quantizer.shift is None else _copy(quantizer.shift)
    return Rounding(_copy(quantizer.alpha.clamp_min(LEAST_ALPHA)), shift, quantizer.levels)


def _copy(tensor: Tensor) -> Tensor:
    """A copy: the engine does not follow what becomes of the model."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
