"""The few places where removing heads is more than shortening tensors.

Forward overrides cover them, both as plain attributes of the module instance, so that weights keep their names:

* a block without units: reshaping an empty tensor to (…, -1, head_dim) is undefined in torch, so the block is
  bypassed and
  contributes only the bias of its output projection;
* a position bias shared by all layers (MPNet, T5): it has one row per head of the dense model, so each layer picks
  the rows
  of the heads it kept and hands the whole bias on.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families import Site, out_features

KEPT_HEADS = "secateur_kept_heads"
"""Attribute of an attention module: indices of its heads in the dense model, set where a quirk needs them."""


def after_slice(site: Site, kept: list[int], family_quirk: str) -> None:
    """Put a block right after its tensors were shortened.

    Args:
        site: the block as it was before the cut (its module is already cut).
        kept: indices of the kept units among the units before the cut.
        family_quirk: `Family.quirk`.
    """
    for attribute in site.block.counts:
        setattr(site.module, attribute, len(kept))
    for attribute in site.block.widths:
        setattr(site.module, attribute, len(kept) * site.width)
    if not kept:
        _override(site.output, _bias_only)
    if site.kind == "neurons":
        return
    before = getattr(site.module, KEPT_HEADS, list(range(site.units)))
    setattr(site.module, KEPT_HEADS, [before[i] for i in kept])
    if family_quirk:
        QUIRKS[family_quirk](site)
    elif not kept:
        _override(site.module, _attention_without_heads(site))


def _override(module: nn.Module, forward: Callable[..., Any]) -> None:
    module.forward = types.MethodType(forward, module)


def _projection_inside(site: Site) -> str:
    """Name of the output projection inside the attention module, or "" if it is applied outside (BERT)."""
    inside = site.block.path + "."
    return site.block.output.path.removeprefix(inside) if site.block.output.path.startswith(inside) else ""


def _empty_context(module: nn.Module, hidden_states: Tensor, projection: str, width: int, **kwargs: Any) -> Tensor:
    """What a block without heads adds to the residual stream; keeps the length of a key-value cache right."""
    cache = kwargs.get("past_key_values")
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is not None and kwargs.get("key_value_states") is None:
        empty = hidden_states.new_zeros(hidden_states.shape[0], 0, hidden_states.shape[1], width)
        cache.update(empty, empty, module.layer_idx)
    context = hidden_states.new_zeros(*hidden_states.shape[:-1], 0)
    if not projection:
        return context
    output: Tensor = getattr(module, projection)(context)
    return output


def _attention_without_heads(site: Site) -> Callable[..., Any]:
    projection, width, returns = _projection_inside(site), site.width, site.block.returns

    def forward(module: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor | None, ...]:
        return (_empty_context(module, hidden_states, projection, width, **kwargs), *(None,) * (returns - 1))

    return forward


def _bias_only(module: nn.Module, x: Tensor) -> Tensor:
    """A linear map without inputs; `Conv1D` cannot reshape an empty tensor, and no kernel needs to run."""
    bias = module.bias
    if isinstance(bias, Tensor):
        return bias.expand(*x.shape[:-1], -1)
    return x.new_zeros(*x.shape[:-1], out_features(module))


def _mpnet(site: Site) -> None:
    """MPNet computes one position bias, (batch, heads, queries, keys), in the encoder for all layers."""
    width, returns = site.width, site.block.returns

    def forward(
        module: nn.Module,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        position_bias: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        kept = getattr(module, KEPT_HEADS)
        if not kept:
            return (_empty_context(module, hidden_states, "o", width), *(None,) * (returns - 1))
        bias = None if position_bias is None else position_bias[:, kept]
        return type(module).forward(module, hidden_states, attention_mask, bias, **kwargs)

    _override(site.module, forward)


def _t5(site: Site) -> None:
    """T5's first layer computes the position bias, (1, heads, queries, keys), and hands it to the later ones."""
    width = site.width

    def forward(
        module: nn.Module, hidden_states: Tensor, *args: Any, position_bias: Tensor | None = None, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        kept = getattr(module, KEPT_HEADS)
        bias = position_bias
        if bias is None and module.has_relative_attention_bias:
            cache = kwargs.get("past_key_values")
            past = 0 if cache is None else cache.get_seq_length(module.layer_idx)
            length = hidden_states.shape[1]
            bias = module.compute_bias(  # type: ignore[operator]
                length, length + past, device=hidden_states.device, past_seen_tokens=past
            )
        if not kept:
            return _empty_context(module, hidden_states, "o", width, **kwargs), bias, None
        # a bias of one row is the all-zero one of cross-attention: it broadcasts over any number of heads
        picked = bias if bias is None or bias.shape[1] == 1 else bias[:, kept]
        output, made, weights = type(module).forward(module, hidden_states, *args, position_bias=picked, **kwargs)
        if bias is None and made is not None:
            bias = made[:, :1]
        return output, bias, weights

    _override(site.module, forward)


QUIRKS: dict[str, Callable[[Site], None]] = {"mpnet": _mpnet, "t5": _t5}


def shorten(module: nn.Module, dimension: int, index: Tensor, bias: bool) -> None:
    """Keep only `index` along one axis of a linear map's weight, and of its bias if `bias`.

    Works in place on `nn.Linear` and `Conv1D`, also on the meta device; parameters keep their dtype, device and
    `requires_grad`.
    """
    parameters = [("weight", dimension)]
    if bias and getattr(module, "bias", None) is not None:
        parameters.append(("bias", 0))
    for name, axis in parameters:
        old = getattr(module, name)
        new = nn.Parameter(
            old.detach().index_select(axis, index.to(old.device)).contiguous(), requires_grad=old.requires_grad
        )
        setattr(module, name, new)
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = module.weight.shape
    elif hasattr(module, "nf"):
        module.nf = out_features(module)  # type: ignore[assignment]


def unit_index(kept: list[int], units: int, size: int, parts: int) -> Tensor:
    """Positions along an axis that belong to the kept units; the axis is `parts` slabs of `units` units each.

    Returns:
        int64 tensor of parts × len(kept) × (size / parts / units) positions, in order.
    """
    positions = torch.arange(size).view(parts, units, size // parts // max(units, 1))
    return positions[:, kept].reshape(-1)
