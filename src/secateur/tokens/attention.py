"""Attention over the tokens that are left, padded or packed, which also scores them where a layer eliminates.

It is registered with transformers under `NAME`; a model uses it through `AttentionConfig` while tokens are being
eliminated, and its own attention at all other times.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface

from secateur.bits.modules import AttentionBits
from secateur.tokens.scores import SHORT, asking
from secateur.tokens.state import CURRENT, Pass, current

NAME = "secateur"


class AttentionConfig:
    """A view of a model's config, for its attention modules, that names an attention function.

    Args:
        config: the model's.
        name: of the function; "" for the model's own.
    """

    def __init__(self, config: Any, name: Callable[[], str]) -> None:
        self._config = config
        self._name = name

    @property
    def _attn_implementation(self) -> Any:
        return self._name() or self._config._attn_implementation

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in (
            "_config",
            "_name",
        ):  # copying and pickling look for these before there is a config
            raise AttributeError(name)
        return getattr(self._config, name)


def eliminating() -> str:
    """The name of our attention while tokens are eliminated, else none."""
    return NAME if CURRENT.get() is not None else ""


def with_attention(config: Any, name: Callable[[], str]) -> Any:
    """A view of a config that names an attention function; elimination's, which runs any other one, comes first."""
    if name is not eliminating and isinstance(config, AttentionConfig) and config._name is eliminating:
        return AttentionConfig(AttentionConfig(config._config, name), eliminating)
    return AttentionConfig(config, name)


def without_attention(config: Any, name: Callable[[], str]) -> Any:
    """Inverse of `with_attention`; a config that does not name the function stays as it is."""
    if not isinstance(config, AttentionConfig):
        return config
    if config._name is name:
        return config._config
    return AttentionConfig(without_attention(config._config, name), config._name)


def attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function as transformers calls it; the mask that comes with the call is ignored.

    Args:
        module: the attention module; one with `attention_bits` multiplies quantised operands.
        query: (batch, heads, width, head width), or (1, heads, Σ lengths, head width) when packed.
        key: as the query; fewer heads are shared between groups of query heads.
        value: as the key.
        attention_mask: not used: the current pass knows which tokens are there.
        dropout: share of probabilities set to zero.
        scaling: of the logits; 1/√(head width) if None.
        sliding_window: tokens attend to tokens whose distance in the input is below it.
        kwargs: not used.

    Returns:
        (batch, width, heads, head width), and None for the probabilities.
    """
    now, bits = current(), getattr(module, "attention_bits", None)
    layout = now.layout
    if not (layout.packed and layout.ragged):
        if layout.packed:
            query, key, value = (_stacked(part, len(layout.lengths)) for part in (query, key, value))
        mask = _windowed(now.mask(), layout.slots, sliding_window)
        real = layout.valid if now.scoring else None
        triangle = now.triangle and sliding_window is None
        context, score = _block(bits, query, key, value, mask, real, now, scaling, dropout, triangle)
        if score is not None:
            now.observe(score)
        return (context.flatten(0, 1)[None] if layout.packed else context), None
    slots = layout.pack(layout.slots) if sliding_window is not None else None
    contexts, scores = [], []
    for group in layout.groups:
        q, k, v = (_grouped(part, group.index, group.shape) for part in (query, key, value))
        places = slots[group.index].view(group.shape) if slots is not None else None
        mask = _windowed(group.valid[:, None, None, :] if group.ragged else None, places, sliding_window)
        real = group.valid if now.scoring else None
        context, score = _block(bits, q, k, v, mask, real, now, scaling, dropout)
        contexts.append(context.flatten(0, 1).index_select(0, group.rows))
        if score is not None:
            scores.append(score.flatten().index_select(0, group.rows))
    back = layout.from_groups
    if now.scoring:
        now.observe(layout.pad(torch.cat(scores).index_select(0, back), -torch.inf))
    return torch.cat(contexts).index_select(0, back)[None], None


def _stacked(packed: Tensor, batch: int) -> Tensor:
    """(1, heads, batch × width, d), all of one length → (batch, heads, width, d)."""
    return packed[0].unflatten(1, (batch, -1)).transpose(0, 1)


def _grouped(packed: Tensor, index: Tensor, shape: tuple[int, int]) -> Tensor:
    """(1, heads, Σ lengths, d) → (sequences, heads, longest, d)."""
    heads, d = packed.shape[1], packed.shape[3]
    return packed[0].index_select(1, index).view(heads, *shape, d).transpose(0, 1)


def _windowed(mask: Tensor | None, slots: Tensor | None, window: int | None) -> Tensor | None:
    """A mask (batch, 1, 1 or queries, keys), True where a query may look, within a window of places in the input."""
    if window is None or slots is None:
        return mask
    near = (slots[:, :, None] - slots[:, None, :]).abs() < window
    itself = torch.eye(slots.shape[1], dtype=torch.bool, device=slots.device)  # padding must look at something
    return near[:, None] if mask is None else (near[:, None] & mask) | itself


def _block(
    bits: AttentionBits | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    real: Tensor | None,
    now: Pass,
    scaling: float | None,
    dropout: float,
    triangle: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Attention of a padded block; with `real`, tokens are scored.

    Short blocks write out the probabilities, which then serve both ends. Long ones run fused, and write out those of
    the queries that score. Quantised operands are multiplied as they are without elimination, and tokens are scored by
    what is multiplied: probabilities and values as they are rounded.

    Returns:
        (batch, queries, heads, head width), and the score (batch, keys).
    """
    groups = query.shape[1] // max(key.shape[1], 1)
    if groups > 1:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    queries, tokens, exporting = now.selection.queries, query.shape[2], torch.compiler.is_exporting()
    short, probabilities = tokens <= SHORT * queries, None
    if bits is not None:
        context, probabilities = bits(query, key, value, mask, dropout, scale)
        if real is not None:
            probabilities, value = bits.supplied(probabilities, value)
    elif real is not None and (exporting or short):
        probabilities = _probabilities(query, key, mask, scale)
        context = torch.nn.functional.dropout(probabilities, dropout, training=dropout > 0) @ value
    else:
        context = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=None if triangle else mask, dropout_p=dropout, scale=scale, is_causal=triangle
        )
    if real is None:
        return context.transpose(1, 2), None
    if probabilities is not None:
        probabilities, places = asked(probabilities, real, queries, causal=now.selection.causal)
        return context.transpose(1, 2), now.score(probabilities, real, value, places)
    places = asking(real.sum(dim=-1), queries, tokens=tokens, causal=now.selection.causal)
    rows = _rows(places)
    scoring = query.detach().gather(2, rows.expand(-1, query.shape[1], -1, query.shape[3]))
    if mask is not None and mask.shape[2] > 1:
        mask = mask.expand(len(rows), -1, -1, -1).gather(2, rows.expand(-1, -1, -1, mask.shape[3]))
    probabilities = _probabilities(scoring, key.detach(), mask, scale)
    return context.transpose(1, 2), now.score(probabilities, real, value, places)


def asked(probabilities: Tensor, real: Tensor, queries: int, *, causal: bool = False) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the queries that score, and their places (`asking`); all of a short block, and None.

    Args:
        probabilities: (batch, heads, queries, keys).
        real: True for real tokens, (batch, keys).
        queries: so many are asked.
        causal: the last ones.
    """
    heads, tokens = probabilities.shape[1], probabilities.shape[3]
    # a graph of every length has one form for all
    if tokens <= SHORT * queries and not torch.compiler.is_exporting():
        return probabilities, None
    places = asking(real.sum(dim=-1), queries, tokens=tokens, causal=causal)
    return probabilities.gather(2, _rows(places).expand(-1, heads, -1, tokens)), places


def _rows(places: Tensor) -> Tensor:
    """Places of queries, (batch, queries), as an index of rows, (batch, 1, queries, 1)."""
    return places.clamp_min(0)[:, None, :, None]


def _probabilities(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Softmax of attention, (batch, heads, queries, keys)."""
    logits = (query * scale) @ key.transpose(2, 3)
    if mask is not None:
        logits = logits.masked_fill(~mask, torch.finfo(logits.dtype).min)
    return logits.softmax(dim=-1)


AttentionInterface.register(NAME, attention)
