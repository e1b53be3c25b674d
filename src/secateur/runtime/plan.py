"""What an encoder computes, as tensors: the neutral form between a transformers model and an engine."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur.bits.modules import BinaryLinear, is_binary
from secateur.costs.tokens import TokenCosts
from secateur.edits import Binarize, DropTokens
from secateur.edits.tokens import dial_of, has_dial
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
        bias: (out,); None if there is none, which a norm never says: its shift is 0.
    """

    weight: Tensor
    bias: Tensor | None


LinearMap = Affine | BinaryAffine


@dataclass(frozen=True)
class LayerPlan:
    """A layer whose norms follow the residual sums, or precede the blocks.

    Attributes:
        heads: attention heads left.
        width: entries of a head.
        qkv: queries, keys and values one below the other; None without heads, or with `parts`.
        out: the attention block's output map; None if the block is bypassed.
        neurons: left in the feed-forward block.
        up: into the neurons; None without neurons.
        down: out of them; None if the block is bypassed.
        after_attention: norm of the residual sum; None if there is none, or the block is bypassed.
        after_feed_forward: norm of the residual sum; None if there is none, or the block is bypassed.
        relative: (heads, 2 R + 1), added to scores where a key is -R to R tokens behind its query; None without.
        parts: maps of queries, keys and values of which some are binary or whose results are rounded; else empty.
        levels: roundings of attention's operands; None if it multiplies floats.
        before_attention: norm of what the block reads, while the residual stream stays as it is; None without.
        before_feed_forward: norm of what the block reads; None without.
        gate: (neurons, hidden), what activated neurons are multiplied by; None without.
        rotary: (tokens that an example may have, width), at each place the cosines, then the sines of the angles that
            entries d and d + width / 2 of queries and keys are turned by; None without.
        window: queries see keys up to so many tokens away; None: all.
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
    before_attention: Affine | None = None
    before_feed_forward: Affine | None = None
    gate: Affine | None = None
    rotary: Tensor | None = None
    window: int | None = None

    @property
    def maps(self) -> list[LinearMap]:
        """All maps that are there."""
        all_of_them = (self.qkv, *self.parts, self.out, self.up, self.gate, self.down)
        return [each for each in all_of_them if each is not None]


@dataclass(frozen=True)
class Head:
    """Linear maps behind the encoder, with an activation between them.

    Attributes:
        maps: one or two.
        activation: between them: "tanh", "relu" or "gelu".
        first: whether it reads one state of each example, that of its first token; else every token's.
        mean: whether that one state is the mean of all tokens' instead.
        norm: behind the activation; None without.
    """

    maps: tuple[LinearMap, ...]
    activation: str = ""
    first: bool = True
    mean: bool = False
    norm: Affine | None = None


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
        words, positions, types: tables of the embeddings; positions or types are None where there are none.
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
        last: norm behind the layers; None without.
        most: tokens that an example may have where no table of positions says it.
    """

    hidden: int
    words: Table
    positions: Tensor | None
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
    last: Affine | None = None
    most: int = 0

    @property
    def longest(self) -> int:
        """Tokens that an example may have."""
        return self.most if self.positions is None else len(self.positions) - self.offset


FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "mpnet", "modernbert")
"""Names of the families, of the table, that there is a plan of."""


def plan_of(model: PreTrainedModel) -> Plan:
    """The plan of a model.

    Args:
        model: a classifier of sequences or tokens whose family is in `FAMILIES`, dense, sliced, bypassed, or sparse,
            whose zeros are weights like any, binary, or eliminating tokens.

    Raises:
        UnsupportedModel: another architecture, head or activation, or maps that are no plain ones.
        InvalidModel: weights that are not finite, or heads without a size.
    """
    found = sites(model)
    name = found.family.name
    if name not in FAMILIES:
        raise UnsupportedModel(
            f"The engine runs {', '.join(FAMILIES)}, not {name}: use the model itself, or export it."
        )
    edits = edits_of(model)
    for name_of, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise InvalidModel(f"{name_of} has values that are NaN or infinite: the weights are damaged.")
    for site in found.heads:
        if site.units < 0 or site.width < 1:
            raise InvalidModel(f"{site.name} has {site.units} heads of {site.width} entries: the config is damaged.")
    config, body = model.config, cast(PreTrainedModel, model.base_model)
    relu = any(isinstance(edit, Binarize) and edit.relu for edit in edits)
    named = next(filter(None, (getattr(config, name, None) for name in _ACTIVATION)), None)
    activation = "relu" if relu else named
    if activation not in ACTIVATIONS:
        raise UnsupportedModel(f"The engine has the activations {', '.join(ACTIVATIONS)}, not {activation!r}.")
    if getattr(config, "is_decoder", False):
        raise UnsupportedModel("The engine runs encoders, and this config says is_decoder.")
    tables = body.get_submodule("embeddings")
    words, norm = (getattr(tables, n) for n in _EMBEDDINGS.get(name, ("word_embeddings", "LayerNorm")))
    positions = getattr(tables, "position_embeddings", None)
    types = getattr(tables, "token_type_embeddings", None)
    epsilons = {module.eps for module in model.modules() if isinstance(module, nn.LayerNorm)}
    if len(epsilons) != 1:
        raise UnsupportedModel("The engine takes one epsilon for all norms.")
    project = getattr(body, "embeddings_project", None)
    positional = _relative(body, len(cast(Any, positions).weight)) if name == "mpnet" else None
    pairs = zip(found.heads, found.neurons, strict=True)
    layers = tuple(_layer(heads, neurons, positional) for heads, neurons in pairs)
    if name == "modernbert":
        layers = _modern(layers, body)
    return Plan(
        hidden=int(getattr(config, "hidden_size", None) or config.dim),
        words=table_of(words),
        positions=_kept(positions.weight) if positions is not None else None,
        types=_kept(types.weight) if types is not None else None,
        offset=words.padding_idx + 1 if name in _SHIFTED else 0,
        padding=config.pad_token_id,
        norm=_norm(norm),
        project=_affine(project) if project is not None else None,
        epsilon=epsilons.pop(),
        activation=ACTIVATIONS[activation],
        layers=layers,
        head=_head(model),
        dropping=Dropping(dial_of(model).edit, dial_of(model).costs) if has_dial(model) else None,
        binary=is_binary(model),
        last=_norm_if_any(getattr(body, "final_norm", None)),
        most=config.max_position_embeddings if positions is None else 0,
    )


_PLAIN = (nn.Linear, nn.LayerNorm, SparseLinear)
_SHIFTED = ("roberta", "xlm-roberta", "camembert", "mpnet")  # positions count from behind the padding's
_ACTIVATION = ("hidden_act", "activation", "hidden_activation")  # what configs call that of the feed-forward blocks
_EMBEDDINGS = {"modernbert": ("tok_embeddings", "norm")}  # the table of words and the norm, where not BERT's names
_STEADY = ("default", "linear", "llama3")  # rotary positions whose angles do not depend on lengths, nor change scores


def _relative(body: PreTrainedModel, reach: int) -> Tensor:
    """The bias of MPNet's heads, (heads, 2 R + 1), where a key is -R to R tokens behind its query."""
    encoder: Any = body.get_submodule("encoder")
    apart = torch.arange(-reach, reach + 1)
    return _kept(encoder.relative_attention_bias.weight[encoder.relative_position_bucket(apart)].T)


def _modern(layers: tuple[LayerPlan, ...], body: PreTrainedModel) -> tuple[LayerPlan, ...]:
    """ModernBERT's layers with their norms, rotary positions and windows; local layers have angles of their own."""
    config, rotary = body.config, cast(Any, body.get_submodule("rotary_emb"))
    places = torch.arange(config.max_position_embeddings, dtype=torch.float32)
    tables: dict[str, Tensor] = {}
    for kind in set(config.layer_types):
        if rotary.rope_type[kind] not in _STEADY:
            raise UnsupportedModel(
                f"The engine has rotary positions of the types {', '.join(_STEADY)}, not {rotary.rope_type[kind]!r}."
            )
        angles = places[:, None] * _kept(getattr(rotary, f"{kind}_inv_freq"))
        tables[kind] = torch.cat([angles.cos(), angles.sin()], dim=1)
    return tuple(
        replace(
            layer,
            before_attention=_norm_if_any(module.attn_norm) if layer.heads else None,
            before_feed_forward=_norm(module.mlp_norm) if layer.neurons else None,
            rotary=tables[kind] if layer.heads else None,
            window=config.sliding_window if kind == "sliding_attention" else None,
        )
        for layer, module, kind in zip(layers, cast(Any, body.layers), config.layer_types, strict=True)
    )


def _layer(heads: Site, neurons: Site, positional: Tensor | None) -> LayerPlan:
    maps = [module for module, cut in heads.cuts if cut.side == "out"]
    ((up, slabs),) = [(module, cut.parts) for module, cut in neurons.cuts if cut.side == "out"]
    inner = _inner(up, slabs) if neurons.units else []
    split = is_split(maps, heads.module)
    kept = getattr(heads.module, KEPT_HEADS, list(range(heads.units)))
    return LayerPlan(
        heads=heads.units,
        width=heads.width,
        qkv=_stacked([_affine(module) for module in maps]) if heads.units and not split else None,
        out=_output(heads),
        neurons=neurons.units,
        up=inner[0] if inner else None,
        down=_output(neurons),
        after_attention=_norm_if_any(heads.norm),
        after_feed_forward=_norm_if_any(neurons.norm),
        relative=positional[kept].contiguous() if positional is not None and heads.units else None,
        parts=tuple(_map(module) for module in maps) if heads.units and split else (),
        levels=levels_of(heads.module) if heads.units else None,
        gate=cast(Affine, inner[1]) if len(inner) == 2 else None,
    )


def _stacked(parts: list[Affine]) -> Affine:
    if len(parts) == 1:
        return parts[0]
    biases = [part.bias for part in parts]
    return Affine(
        torch.cat([part.weight for part in parts]),
        torch.cat(cast(list[Tensor], biases)) if None not in biases else None,
    )


def _output(site: Site) -> LinearMap | None:
    """A block's last map; None if the block is bypassed: it has no norm left, or without one nothing to add."""
    there = site.units or site.output.bias is not None if site.norm is None else isinstance(site.norm, nn.LayerNorm)
    return _map(site.output) if there else None


def _inner(module: nn.Module, count: int) -> list[LinearMap]:
    """The maps into the neurons, which may lie one below the other in one."""
    if count == 1:
        return [_map(module)]
    affine = _affine(module)
    biases = [None] * count if affine.bias is None else affine.bias.chunk(count)
    return [Affine(*both) for both in zip(affine.weight.chunk(count), biases, strict=True)]


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


_MODERN_HEADS = ("ModernBertForSequenceClassification", "ModernBertForTokenClassification")


def _modern_head(model: Any) -> Head:
    activation = model.config.classifier_activation
    if activation not in ("gelu", "relu", "tanh"):
        raise UnsupportedModel(f"The engine has heads with gelu, relu or tanh, not {activation!r}.")
    first = type(model).__name__ == _MODERN_HEADS[0]
    mean = first and model.config.classifier_pooling == "mean"
    maps = (_affine(model.head.dense), _affine(model.classifier))
    return Head(maps, activation, first, mean, _norm(model.head.norm))


def _head(model: PreTrainedModel) -> Head:
    name = type(model).__name__
    if name in _MODERN_HEADS:
        return _modern_head(model)
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


def _norm_if_any(module: nn.Module | None) -> Affine | None:
    return None if module is None or isinstance(module, nn.Identity) else _norm(module)


def _norm(module: nn.Module) -> Affine:
    """A norm, with a shift of 0 if it has none."""
    found = _affine(module)
    return found if found.bias is not None else Affine(found.weight, torch.zeros_like(found.weight))


def _kept(tensor: Tensor) -> Tensor:
    """A copy: the engine does not follow what becomes of the model."""
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()
