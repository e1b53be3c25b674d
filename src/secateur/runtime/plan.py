"""What an encoder computes, as tensors: the neutral form between a transformers model and an engine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.bits.modules import BinaryLinear, is_binary
from secateur.costs.tokens import TokenCosts
from secateur.edits import Binarize, Bypass, DropTokens, Slice, Sparsify
from secateur.edits.tokens import dial_of
from secateur.errors import InvalidModel, UnsupportedModel
from secateur.families import Site, sites
from secateur.hub import edits_of
from secateur.quirks import KEPT_HEADS
from secateur.runtime.binary import BinaryAffine, ProductLevels, Table, binary_affine, is_split, levels_of, table_of
from secateur.sparsity.linear import SparseLinear

ACTIVATIONS = {
    "gelu": "gelu",
    "relu": "relu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
}
"""Activations of the feed-forward blocks, by the name in a config."""


@dataclass(frozen=True)
class Affine:
    """A linear map, or the gain and shift of a norm.

    Attributes:
        weight: (out, in), or (width,) of a norm.
        bias: (out,); None if there is none.
    """

    weight: Tensor
    bias: Tensor | None


LinearMap = Affine | BinaryAffine


@dataclass(frozen=True)
class LayerPlan:
    """A layer whose norms follow the residual sums.

    Attributes:
        heads: attention heads left.
        width: entries of a head.
        qkv: queries, keys and values one below the other; None without heads, or with `parts`.
        out: the attention block's output map; None if the block is bypassed.
        neurons: left in the feed-forward block.
        up: into the neurons; None without neurons.
        down: out of them; None if the block is bypassed.
        after_attention: norm; None if the block is bypassed.
        after_feed_forward: norm; None if the block is bypassed.
        relative: (heads, 2 R + 1), added to scores where a key is -R to R tokens behind its query; None without.
        parts: maps of queries, keys and values of which some are binary or whose results are rounded; else empty.
        levels: roundings of attention's operands; None if it multiplies floats.
    """

    heads: int
    width: int
    qkv: Affine | None
    out: LinearMap | None
    neurons: int
    up: LinearMap | None
    down: LinearMap | None
    after_attention: Affine | None
    after_feed_forward: Affine | None
    relative: Tensor | None = None
    parts: tuple[LinearMap, ...] = ()
    levels: ProductLevels | None = None

    @property
    def maps(self) -> list[LinearMap]:
        """All maps that are there."""
        return [each for each in (self.qkv, *self.parts, self.out, self.up, self.down) if each is not None]


@dataclass(frozen=True)
class Head:
    """Linear maps behind the encoder, with an activation between them.

    Attributes:
        maps: one or two.
        activation: between them: "tanh", "relu" or "gelu".
        first: whether it reads each example's first token; else every token.
    """

    maps: tuple[LinearMap, ...]
    activation: str = ""
    first: bool = True


@dataclass(frozen=True)
class Dropping:
    """Layers that hand on fewer tokens, as a dial says.

    Attributes:
        edit: profile, and how tokens are scored.
        costs: MACs of the layers, by which a speed-up is counted.
    """

    edit: DropTokens
    costs: TokenCosts


@dataclass(frozen=True)
class Plan:
    """An encoder and its head.

    Attributes:
        hidden: width of the residual stream.
        words, positions, types: tables of the embeddings; types is None without token types.
        offset: the first token's position.
        padding: the token that fills batches up, which an engine is not given; None if there is none.
        norm: of the embeddings.
        project: from the embeddings' width to the hidden one, where they differ.
        epsilon: of all norms.
        activation: of the feed-forward blocks.
        layers: in order.
        head: what gives the logits.
        dropping: token elimination between attention and feed-forward blocks; None without.
        binary: whether maps are, so that all others multiply floats.
    """

    hidden: int
    words: Table
    positions: Tensor
    types: Tensor | None
    offset: int
    padding: int | None
    norm: Affine
    project: Affine | None
    epsilon: float
    activation: str
    layers: tuple[LayerPlan, ...] = field(repr=False)
    head: Head = field(repr=False)
    dropping: Dropping | None = None
    binary: bool = False

    @property
    def longest(self) -> int:
        """Tokens that an example may have."""
        return len(self.positions) - self.offset


FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet")
"""Names of the families, of the table, that there is a plan of."""


def plan_of(model: PreTrainedModel) -> Plan:
    """The plan of a model.

    Args:
        model: a classifier of sequences or tokens whose family is in `FAMILIES`, dense, sliced, bypassed, or sparse,
            whose zeros are weights like any, binary, or eliminating tokens.

    Raises:
        UnsupportedModel: another architecture, head, activation or edit, or maps that are no plain ones.
        InvalidModel: weights that are not finite.
    """
    found = sites(model)
    name = found.family.name
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"The engine runs {', '.join(FAMILIES)}, not {name}: use the model itself, or export it."
        )
    edits = edits_of(model)
    if other := [edit.type for edit in edits if not isinstance(edit, _EDITS)]:
        raise UnsupportedModel(f"The engine does not run what the edit {other[0]} made: use the model itself.")
    for name_of, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InvalidModel(f"{name_of} has values that are NaN or infinite: the weights are damaged.")
    config, body = model.config, cast(PreTrainedModel, model.base_model)
    relu = any(isinstance(edit, Binarize) and edit.relu for edit in edits)
    activation = "relu" if relu else getattr(config, "hidden_act", None) or getattr(config, "activation", None)
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"The engine has the activations {', '.join(ACTIVATIONS)}, not {activation!r}.")
    if getattr(config, "is_decoder", False):
        raise UnsupportedModel("The engine runs encoders, and this config says is_decoder.")
    tables = body.get_submodule("embeddings")
    words, positions, norm = (cast(nn.Module, getattr(tables, n)) for n in _EMBEDDINGS)
    types = getattr(tables, "token_type_embeddings", None)
    epsilons = {module.eps for module in body.modules() if isinstance(module, nn.LayerNorm)}
    if len(epsilons) != 1:
        raise UnsupportedModel("The engine takes one epsilon for all norms.")
    project = getattr(body, "embeddings_project", None)
    positional = _relative(body, len(cast(Tensor, positions.weight))) if name == "mpnet" else None
    pairs = zip(found.heads, found.neurons, strict=True)
    return Plan(
        hidden=int(getattr(config, "hidden_size", None) or config.dim),
        words=table_of(words),
        positions=_kept(cast(Tensor, positions.weight)),
        types=_kept(types.weight) if types is not None else None,
        offset=cast(int, words.padding_idx) + 1 if name in _SHIFTED else 0,
        padding=config.pad_token_id,
        norm=_affine(norm),
        project=_affine(project) if project is not None else None,
        epsilon=epsilons.pop(),
        activation=ACTIVATIONS[activation],
        layers=tuple(_layer(heads, neurons, positional) for heads, neurons in pairs),
        head=_head(model),
        dropping=next((Dropping(edit, dial_of(model).costs) for edit in edits if isinstance(edit, DropTokens)), None),
        binary=is_binary(model),
    )


_EDITS = (Slice, Bypass, Sparsify, Binarize, DropTokens)
_PLAIN = (nn.Linear, nn.LayerNorm, SparseLinear)
_SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions count from behind the padding's
_EMBEDDINGS = ("word_embeddings", "position_embeddings", "LayerNorm")


def _relative(body: PreTrainedModel, reach: int) -> Tensor:
    """The bias of MPNet's heads, (heads, 2 R + 1), where a key is -R to R tokens behind its query."""
    encoder: Any = body.get_submodule("encoder")
    apart = torch.arange(-reach, reach + 1)
    return _kept(encoder.relative_attention_bias.weight[encoder.relative_position_bucket(apart)].T)


def _layer(heads: Site, neurons: Site, positional: Tensor | None) -> LayerPlan:
    maps = [module for module, cut in heads.cuts if cut.side == "out"]
    (up,) = [module for module, cut in neurons.cuts if cut.side == "out"]
    split = is_split(maps, heads.module)
    kept = getattr(heads.module, KEPT_HEADS, list(range(heads.units)))
    return LayerPlan(
        heads=heads.units,
        width=heads.width,
        qkv=_stacked([_affine(module) for module in maps]) if heads.units and not split else None,
        out=_map(heads.output) if isinstance(heads.norm, nn.LayerNorm) else None,
        neurons=neurons.units,
        up=_map(up) if neurons.units else None,
        down=_map(neurons.output) if isinstance(neurons.norm, nn.LayerNorm) else None,
        after_attention=_affine(heads.norm) if isinstance(heads.norm, nn.LayerNorm) else None,
        after_feed_forward=_affine(neurons.norm) if isinstance(neurons.norm, nn.LayerNorm) else None,
        relative=positional[kept].contiguous() if positional is not None and heads.units else None,
        parts=tuple(_map(module) for module in maps) if heads.units and split else (),
        levels=levels_of(heads.module) if heads.units else None,
    )


def _stacked(parts: list[Affine]) -> Affine:
    biases = [part.bias for part in parts]
    return Affine(
        torch.cat([part.weight for part in parts]),
        torch.cat(cast(list[Tensor], biases)) if None not in biases else None,
    )


_HEADS = {
    # what the class's name ends with: the maps, and the activation between them
    "BertForSequenceClassification": (("bert.pooler.dense", "classifier"), "tanh"),
    "DistilBertForSequenceClassification": (("pre_classifier", "classifier"), "relu"),
    "ElectraForSequenceClassification": (("classifier.dense", "classifier.out_proj"), "gelu"),
    "RobertaForSequenceClassification": (("classifier.dense", "classifier.out_proj"), "tanh"),
    "XLMRobertaForSequenceClassification": (("classifier.dense", "classifier.out_proj"), "tanh"),
    "MPNetForSequenceClassification": (("classifier.dense", "classifier.out_proj"), "tanh"),
    "CamembertForSequenceClassification": (("classifier.dense", "classifier.out_proj"), "tanh"),
}


def _head(model: PreTrainedModel) -> Head:
    name = type(model).__name__
    if name in _HEADS:
        paths, activation = _HEADS[name]
        return Head(tuple(_map(model.get_submodule(path)) for path in paths), activation)
    if name.endswith("ForTokenClassification"):
        return Head((_map(model.get_submodule("classifier")),), first=False)
    raise UnsupportedModel(f"The engine runs classifiers of sequences and tokens, not {name}.")


def _map(module: nn.Module) -> LinearMap:
    return binary_affine(module) if isinstance(module, BinaryLinear) else _affine(module)


def _affine(module: nn.Module | None) -> Affine:
    if type(module) not in _PLAIN:
        raise UnsupportedModel(
            f"The engine reads plain linear maps and norms, not {type(module).__name__}: merge adapters and undo "
            "quantisation first."
        )
    weight, bias = (getattr(module, n) for n in ("weight", "bias"))
    return Affine(_kept(weight), _kept(bias) if bias is not None else None)


def _kept(tensor: Tensor) -> Tensor:
    """A copy: the engine does not follow what becomes of the model."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
