"""The table on a live model: every block with its modules and the units it has now."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from secateur.errors import UnsupportedModel
from secateur.families.spec import Block, Cut, Family, Stack, UnitKind
from secateur.families.table import FAMILIES


@dataclass(frozen=True)
class Site:
    """A block found in a live model, with the number of units it has now.

    Attributes:
        name: dotted path of the block's module from the base model, the site's stable name.
        layer: index of the layer within its stack.
        stack: path of the stack.
        layer_module: the whole layer (attention, feed-forward, norms).
        module: the block's module; `output` is its output projection.
        cuts: (map, cut) for each axis that shrinks.
        units: heads (key-value groups for grouped-query attention) or neurons present now.
        width: inputs of the output projection that belong to one unit.
        norm: the LayerNorm after the residual sum, where there is one.
        layers: the list that the layer is in.
    """

    block: Block
    name: str
    layer: int
    stack: str
    layer_module: nn.Module = field(repr=False)
    module: nn.Module = field(repr=False)
    output: nn.Module = field(repr=False)
    cuts: tuple[tuple[nn.Module, Cut], ...] = field(repr=False)
    units: int
    width: int
    norm: nn.Module | None = field(repr=False)
    layers: nn.Module = field(repr=False)

    @property
    def kind(self) -> UnitKind:
        return self.block.kind


@dataclass(frozen=True)
class Sites:
    """All blocks of a model, stack by stack and layer by layer (self-attention before cross-attention)."""

    family: Family
    heads: tuple[Site, ...]
    neurons: tuple[Site, ...]

    def __iter__(self) -> Iterator[Site]:
        yield from self.heads
        yield from self.neurons


def in_features(module: nn.Module) -> int:
    """Inputs of a linear map: `nn.Linear` stores W as (out, in), `Conv1D` as (in, out)."""
    return weight_of(module).shape[axis(module, "in")]


def out_features(module: nn.Module) -> int:
    """Outputs of a linear map."""
    return weight_of(module).shape[axis(module, "out")]


def axis(module: nn.Module, side: Literal["out", "in"]) -> int:
    """The axis of `module.weight` that holds its outputs or its inputs."""
    out_axis = 0 if isinstance(module, nn.Linear) else 1
    return out_axis if side == "out" else 1 - out_axis


def output_weight(site: Site) -> torch.Tensor:
    """Weight of the block's output projection as (hidden, units × width), whatever the module's own layout."""
    weight = weight_of(site.output)
    return weight if axis(site.output, "out") == 0 else weight.T


def weight_of(module: nn.Module) -> torch.Tensor:
    """The weight of a linear map."""
    weight = module.weight
    if not isinstance(weight, torch.Tensor):
        raise UnsupportedModel(f"{type(module).__name__} has no weight tensor: secateur cuts linear maps only.")
    return weight


def family_of(model: nn.Module) -> Family:
    """The family of a transformers model.

    Raises:
        UnsupportedModel: the architecture is not in the table, or its modules are named differently in the installed
            transformers; the message names the first missing module and the nearest family.
    """
    return sites(model).family


def sites(model: nn.Module) -> Sites:
    """Resolve the family table on a live model: every block, with the units it has now.

    Args:
        model: any transformers model of a known family, with or without a task head, sliced or not.

    Raises:
        UnsupportedModel: see `family_of`.
    """
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if model_type is None:
        raise UnsupportedModel(f"{type(model).__name__} is not a transformers model: pass one opened by AutoModelFor….")
    candidates = [family for family in FAMILIES.values() if model_type in family.model_types]
    if not candidates:
        known = sorted({t for family in FAMILIES.values() for t in family.model_types})
        nearest = difflib.get_close_matches(model_type, known, n=1, cutoff=0.0)[0]
        raise UnsupportedModel(
            f"Architecture '{model_type}' is not in secateur's table (nearest: '{nearest}'). Known: {', '.join(known)}."
        )
    failure: UnsupportedModel | None = None
    for family in candidates:
        try:
            return _resolve(model, family)
        except UnsupportedModel as error:
            failure = failure or error
    raise failure or UnsupportedModel(model_type)


def _resolve(model: nn.Module, family: Family) -> Sites:
    base = getattr(model, "base_model", model)
    heads: list[Site] = []
    neurons: list[Site] = []
    for stack in family.stacks:
        if stack.optional and _find(base, stack.layers) is None:
            continue
        layers = _require(base, stack.layers, family)
        for index, layer in enumerate(layers.children()):
            for block in stack.attention:
                heads.append(_site(layers, layer, index, stack, block, family))
            neurons.append(_site(layers, layer, index, stack, stack.ffn, family))
    if not neurons:
        raise UnsupportedModel(f"The {family.name} model has no layers at '{family.stacks[0].layers}'.")
    return Sites(family, tuple(heads), tuple(neurons))


def _site(layers: nn.Module, layer: nn.Module, index: int, stack: Stack, block: Block, family: Family) -> Site:
    prefix = f"{stack.layers}.{index}"
    module = _require(layer, block.path, family, prefix)
    output = _require(layer, block.output.path, family, prefix)
    width = 1
    if block.kind == "heads":
        width = int(_attribute(module, block.head_dim, family, f"{prefix}.{block.path}"))
        if block.group:
            width *= int(_attribute(module, block.group, family, f"{prefix}.{block.path}"))
    cuts = []
    for cut in block.cuts:
        if cut.optional and _find(layer, cut.path) is None:
            continue
        cuts.append((_require(layer, cut.path, family, prefix), cut))
    name = f"{prefix}.{block.path}" if block.path else f"{prefix}.{block.output.path}"
    units = in_features(output) // width
    norm = _require(layer, block.norm, family, prefix) if block.norm else None
    return Site(block, name, index, stack.layers, layer, module, output, tuple(cuts), units, width, norm, layers)


def _find(root: nn.Module, path: str) -> nn.Module | None:
    try:
        return root.get_submodule(path)
    except AttributeError:
        return None


def _require(root: nn.Module, path: str, family: Family, prefix: str = "") -> nn.Module:
    module = _find(root, path)
    if module is None:
        full = f"{prefix}.{path}" if prefix else path
        raise UnsupportedModel(
            f"This {type(root).__name__} has no module '{full}', which family '{family.name}' expects: "
            "the architecture changed in the installed transformers, or this is another variant of it."
        )
    return module


def _attribute(module: nn.Module, name: str, family: Family, path: str) -> Any:
    if not hasattr(module, name):
        raise UnsupportedModel(f"Module '{path}' has no attribute '{name}', which family '{family.name}' expects.")
    return getattr(module, name)
