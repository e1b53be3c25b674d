"""Modules that compute with quantised operands: linear maps, attention, look-ups of words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import embedding, linear
from transformers import AttentionInterface

from secateur.bits.quantizers import (
    LEAST_ALPHA,
    Estimate,
    Levels,
    binarized,
    first_alpha,
    scaled_gradient,
    to_levels,
)
from secateur.errors import SecateurError
from secateur.sparsity.storage import int8_rows

NAME = "secateur_bits"
SAMPLE = 1 << 16  # values of an activation that are looked at in each batch
Dropout = float | nn.Module
"""Share of probabilities set to zero in training, or the module that does so."""


@dataclass
class _Calibration:
    how: Estimate
    seen: list[Tensor]


class Quantizer(nn.Module):
    """Rounds an activation to levels, with a learned scale α and, at linear maps, a learned shift of each channel.

    Until it is calibrated (`calibrate`) α is NaN, and so is what it gives.

    Args:
        levels: what it rounds to.
        channels: entries of the shift; none if 0.
        like: a tensor of the dtype and on the device that the parameters shall have.
    """

    def __init__(self, levels: Levels, channels: int, like: Tensor) -> None:
        super().__init__()
        self.levels = levels
        self.alpha = nn.Parameter(torch.full((), torch.nan, dtype=like.dtype, device=like.device))
        self.shift = nn.Parameter(torch.zeros(channels, dtype=like.dtype, device=like.device)) if channels else None
        self._calibration: _Calibration | None = None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Levels of x, in its shape, and α; the gradient of α is divided by √(elements · highest level), as in LSQ."""
        if self._calibration is not None:
            self._look(x, self._calibration)
        alpha = self.alpha.clamp_min(LEAST_ALPHA)
        if torch.is_grad_enabled() and alpha.requires_grad:
            alpha = scaled_gradient(alpha, (x.numel() * self.levels.highest) ** -0.5)
        return to_levels(x, alpha, self.shift, self.levels), alpha

    @torch.no_grad()
    def _look(self, x: Tensor, calibration: _Calibration) -> None:
        """Choose α by all samples so far, so that what follows is calibrated behind quantised activations."""
        flat = (x if self.shift is None else x - self.shift).flatten()
        draw = torch.randint(flat.numel(), (min(SAMPLE, flat.numel()),), generator=torch.Generator().manual_seed(0))
        calibration.seen.append(flat[draw.to(flat.device)])
        self.alpha.copy_(first_alpha(torch.cat(calibration.seen), self.levels, calibration.how))

    def extra_repr(self) -> str:
        return f"{self.levels.lowest}…{self.levels.highest}"


class BinaryLinear(nn.Linear):
    """An `nn.Linear` with weights ±s and a quantised input: Y = (levels · signsᵀ) · α s + b.

    `weight` holds the latent weights, from which signs and s are taken in every step of training.
    """

    input_bits: Quantizer
    rows: bool

    def forward(self, input: Tensor) -> Tensor:
        """Y of shape (..., out) for x of shape (..., in), in the precision of the weights, also under autocast."""
        with torch.autocast(input.device.type, enabled=False):
            levels, alpha = self.input_bits(input.to(self.weight.dtype))
            signs, scale = self.signs()
            product = linear(levels, signs) * (alpha * scale)
            return product if self.bias is None else product + self.bias

    def signs(self) -> tuple[Tensor, Tensor]:
        """Signs of the weights, of their shape, and their scale."""
        return binarized(self.weight, rows=self.rows)


class BinaryEmbedding(nn.Embedding):
    """An `nn.Embedding` whose rows are s_r · sgn(w - e_r), with scale and centre of each row; the sum stays float."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of shape (..., width) for ids of shape (...)."""
        rows = embedding(input, self.weight, self.padding_idx)
        signs, scale = binarized(rows.flatten(0, -2), rows=True)
        return (signs * scale[:, None]).view_as(rows)


class RoundedEmbedding(nn.Embedding):
    """An `nn.Embedding` whose rows are whole numbers from -127 to 127 times a scale of each row, as they are stored."""

    def forward(self, input: Tensor) -> Tensor:
        """Rows of shape (..., width) for ids of shape (...); the gradient goes straight through."""
        rows = embedding(input, self.weight, self.padding_idx)
        whole, scale = int8_rows(rows.detach().flatten(0, -2))
        rounded = (whole * scale[:, None]).view_as(rows).to(rows.dtype)
        return rounded + (rows - rows.detach()) if rows.requires_grad else rounded


class AttentionBits(nn.ModuleDict):
    """Attention of one block on quantised operands: softmax(Q Kᵀ · scaling + mask) V (spec 2.3).

    Without gradients probabilities are computed in float64, so that which of them reach half of α does not depend on
    the order of a sum.

    Args:
        levels: of "query", "key", "value" and "probs".
        like: a tensor of the dtype and on the device that the scales shall have.
    """

    def __init__(self, levels: dict[str, Levels], like: Tensor) -> None:
        super().__init__({name: Quantizer(each, 0, like) for name, each in levels.items()})

    def of(self, operand: str) -> Quantizer:
        """The quantiser of an operand."""
        return cast(Quantizer, self[operand])

    def dropped(self, probabilities: Tensor, dropout: Dropout) -> Tensor:
        """Probabilities, of which some are zero in training."""
        if isinstance(dropout, nn.Module):  # which hooks may look at
            found: Tensor = dropout(probabilities)
            return found
        return drop(probabilities, dropout, self.training)

    @torch.no_grad()
    def supplied(self, probabilities: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """What tokens are scored by: rounded probabilities, times their scale, and levels of the values.

        In float64, so that scores of tokens that get as many levels are equal, whatever the order of sums.
        """
        levels, alpha = self.of("probs")(probabilities)
        return levels.double() * alpha.double(), self.of("value")(value)[0].double()

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: Dropout, scaling: float
    ) -> tuple[Tensor, Tensor]:
        """Context, (batch, heads, tokens, head width), and the probabilities before they are rounded."""
        with torch.autocast(query.device.type, enabled=False):
            (q, of_q), (k, of_k), (v, of_v) = self["query"](query), self["key"](key), self["value"](value)
            scores = masked((q @ k.transpose(-1, -2)) * (of_q * of_k * scaling), mask)
            probabilities = scores.softmax(dim=-1, dtype=torch.float32 if torch.is_grad_enabled() else torch.float64)
            p, of_p = self["probs"](self.dropped(probabilities, dropout))
            return (p.to(v.dtype) @ v) * (of_p * of_v), probabilities


def masked(scores: Tensor, mask: Tensor | None) -> Tensor:
    """Scores with a mask that is True where a query may look, or is added."""
    if mask is None:
        return scores
    return scores.masked_fill(~mask, torch.finfo(scores.dtype).min) if mask.dtype == torch.bool else scores + mask


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any = None,
    dropout: Dropout = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:
    """Attention on quantised operands, as transformers calls it.

    Args:
        module: the attention module, with `attention_bits`.
        query: (batch, heads, tokens, head width).
        key: as the query.
        value: as the query.
        attention_mask: (batch, 1, 1 or queries, keys): True where a query may look, or what is added.
        dropout: see `Dropout`.
        scaling: of the products; 1/√(head width) if None.
        kwargs: not used.

    Returns:
        Context, (batch, tokens, heads, head width), and the probabilities before they are rounded.
    """
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise SecateurError(
            "Attention on quantised operands takes a tensor as mask: open with attn_implementation='sdpa'."
        )
    bits = cast(AttentionBits, module.attention_bits)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    context, probabilities = bits(query, key, value, attention_mask, dropout, scaling)
    return context.transpose(1, 2).contiguous(), probabilities.to(query.dtype)


AttentionInterface.register(NAME, attention)


def implementation() -> str:
    """The name that `attention` is registered under."""
    return NAME


def is_binary(model: nn.Module) -> bool:
    """Whether some of a model's maps are binary, or an attention multiplies levels."""
    return any(isinstance(module, (BinaryLinear, AttentionBits)) for module in model.modules())


@contextmanager
def plain_tables(model: nn.Module) -> Iterator[None]:
    """Within the context tables of whole numbers hold their rounded values, so that a graph needs not round them."""
    tables = [module for module in model.modules() if isinstance(module, RoundedEmbedding)]
    usual = [table.weight for table in tables]
    for table in tables:
        whole, scale = int8_rows(table.weight.detach())
        table.__class__ = nn.Embedding  # type: ignore[assignment]
        table.weight = nn.Parameter((whole * scale[:, None]).to(table.weight.dtype), requires_grad=False)
    try:
        yield
    finally:
        for table, weight in zip(tables, usual, strict=True):
            table.weight, table.__class__ = weight, RoundedEmbedding


def quantizers(model: nn.Module) -> list[Quantizer]:
    """All quantisers of a model."""
    return [module for module in model.modules() if isinstance(module, Quantizer)]


@torch.no_grad()
def calibrate(model: nn.Module, batches: Sequence[dict[str, Tensor]], how: Estimate = "search") -> None:
    """Choose every α by what reaches it in some batches, from the input on; shifts stay as they are.

    Args:
        model: a binarized model; it is left in the mode it was in.
        batches: inputs, without labels.
        how: see `quantizers.first_alpha`.

    Raises:
        SecateurError: there is no batch, or a quantiser saw nothing, or no finite values.
    """
    device = next(model.parameters()).device
    with _calibrating(model, how):
        for batch in batches:
            model(**{name: tensor.to(device) for name, tensor in batch.items()})
    blind = [name for name, module in model.named_modules() if isinstance(module, Quantizer) and not _ready(module)]
    if blind:
        raise SecateurError(
            f"{blind[0]} saw no finite activation: calibrate on at least one batch, with a model whose outputs are "
            "finite."
        )


def _ready(quantizer: Quantizer) -> bool:
    return bool(quantizer.alpha.isfinite())


@contextmanager
def _calibrating(model: nn.Module, how: Estimate) -> Iterator[None]:
    training = [module for module in model.modules() if module.training]
    model.eval()
    found = quantizers(model)
    for quantizer in found:
        quantizer._calibration = _Calibration(how, [])
    try:
        yield
    finally:
        for quantizer in found:
            quantizer._calibration = None
        for module in training:
            module.training = True
