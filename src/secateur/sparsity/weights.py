"""The weights that can go: those of the linear maps inside the layers."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import axis, sites, weight_of


def prunable(
    model: nn.Module, pattern: str | None = None, kinds: Collection[str] = ("heads", "neurons")
) -> dict[str, nn.Parameter]:
    """Weights of the linear maps that the family table names, by name in the base model: of BERT six in each layer.

    No biases, norms, embeddings, pooler or head, and none of blocks that lost all their units.
    12·(4·768² + 2·768·3072) = 84,934,656 weights in BERT-base.
    DeBERTa-v2 has its maps of positions besides, if they are not shared with those of the words.

    Args:
        model: a model of a known family.
        pattern: a regular expression that part of the name must match.
        kinds: the maps of these blocks: "heads" (attention), "neurons" (feed-forward).

    Raises:
        SecateurError: the pattern cannot be read, or matches no weight.
    """
    try:
        wanted = re.compile(pattern or "")
    except re.error as error:
        raise SecateurError(f"The pattern of weights '{pattern}' is no regular expression: {error}.") from None
    inside = {
        id(weight_of(module))
        for site in sites(model)
        if site.kind in kinds
        for module, _ in site.cuts
        if _is_map(module)
    }
    named = {name: p for name, p in base_of(model)[0].named_parameters() if id(p) in inside and p.numel()}
    if not named:
        raise SecateurError(f"The model has no {' and '.join(sorted(kinds))} whose weights could go.")
    found = {name: p for name, p in named.items() if wanted.search(name)}
    if not found:
        raise SecateurError(f"The pattern '{pattern}' matches no weight; there are such as {next(iter(named))}.")
    return found


def base_of(model: nn.Module) -> tuple[nn.Module, str]:
    """The model without its head, and what its parameters' names begin with in the whole."""
    base = getattr(model, "base_model", model)
    name = next(name for name, module in model.named_modules() if module is base)
    return base, f"{name}." if name else ""


def owner_of(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that a weight belongs to, by the weight's name in the base model, and its name there."""
    path, _, key = name.rpartition(".")
    return base_of(model)[0].get_submodule(path), key


def turned(model: nn.Module, name: str) -> bool:
    """Whether a map stores its weight as (in, out), as `Conv1D` does."""
    return axis(owner_of(model, name)[0], "out") == 1


def stored_block(model: nn.Module, name: str, block: tuple[int, int]) -> tuple[int, int]:
    """Rows × columns of a block of (out, in) in a map's weight as it is stored."""
    return block[::-1] if turned(model, name) else block


def sparsity(weights: Mapping[str, Tensor]) -> float:
    """Share of exact zeros."""
    zeros = sum(int((tensor == 0).sum()) for tensor in weights.values())
    return zeros / max(1, sum(tensor.numel() for tensor in weights.values()))


def _is_map(module: nn.Module) -> bool:
    return isinstance(getattr(module, "weight", None), torch.Tensor) and not isinstance(module, nn.Embedding)
