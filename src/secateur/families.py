"""Where heads and neurons live in each architecture: data, written once per architecture.

A `Family` lists its stacks of layers; a stack lists its attention blocks and its feed-forward block; a block lists the
`Cut`s, the tensor axes that shrink when one of its units goes. `sites(model)` resolves the table on a live model
(also one
that was sliced before) and raises `UnsupportedModel` if the installed transformers names things differently.

To add an architecture, add one entry to `FAMILIES`; the contract suite proves it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from secateur.errors import UnsupportedModel

UnitKind = Literal["heads", "neurons"]


@dataclass(frozen=True)
class Cut:
    """One tensor axis that shrinks when a unit goes.

    Attributes:
        path: the linear map (`nn.Linear` or `Conv1D`), relative to the layer.
        side: `"out"` if its outputs go (rows of W, and the bias), `"in"` if its inputs go.
        parts: equal slabs stacked along that axis (3 for a fused QKV map, 2 for a fused gated projection).
        optional: True if a configuration of the architecture may lack it.
    """

    path: str
    side: Literal["out", "in"]
    parts: int = 1
    optional: bool = False


@dataclass(frozen=True)
class Block:
    """An attention or a feed-forward block of one layer.

    Attributes:
        kind: the unit it is made of.
        path: the module whose forward computes the block (attention without heads is bypassed there).
        cuts: every axis that shrinks; exactly one has side `"in"`: the output projection, where gates act.
        head_dim: for heads, the attribute of the module that holds the width of one head.
        group: for heads, the attribute that holds the number of query heads per key-value head (grouped-query
            attention).
        counts: attributes of the module to set to the number of units after slicing.
        widths: attributes to set to units × head width after slicing.
        returns: length of the tuple that the attention module returns.
        cross: True for cross-attention (keys and values come from the encoder).
    """

    kind: UnitKind
    path: str
    cuts: tuple[Cut, ...]
    head_dim: str = ""
    group: str = ""
    counts: tuple[str, ...] = ()
    widths: tuple[str, ...] = ()
    returns: int = 2
    cross: bool = False

    @property
    def output(self) -> Cut:
        """The output projection: its input axis is where a unit's contribution enters the residual stream."""
        return next(cut for cut in self.cuts if cut.side == "in")


@dataclass(frozen=True)
class Stack:
    """A list of equal layers: `layers` is the path of the `ModuleList` from the base model."""

    layers: str
    attention: tuple[Block, ...]
    ffn: Block
    optional: bool = False


@dataclass(frozen=True)
class Family:
    """One architecture as data.

    Attributes:
        name: the architecture.
        model_types: the `config.model_type`s it covers.
        stacks: its lists of layers.
        norm: `"post"` if LayerNorm follows the residual sum (BERT), `"pre"` if it precedes each block (ViT, GPT-2).
        modality: what the model reads.
        quirk: name of the after-slice fix in `quirks.QUIRKS`, if one is needed.
    """

    name: str
    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    norm: Literal["post", "pre"] = "post"
    modality: Literal["text", "image"] = "text"
    quirk: str = ""


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


def _ffn(path: str, up: str | tuple[str, ...], down: str, parts: int = 1) -> Block:
    ups = (up,) if isinstance(up, str) else up
    return Block("neurons", path, (*(Cut(u, "out", parts) for u in ups), Cut(down, "in")))


def _attention(
    path: str,
    qkv: tuple[str, ...],
    out: str,
    head_dim: str,
    *,
    parts: int = 1,
    counts: tuple[str, ...] = (),
    widths: tuple[str, ...] = (),
    optional: tuple[str, ...] = (),
    group: str = "",
    returns: int = 2,
    cross: bool = False,
) -> Block:
    cuts = (
        *(Cut(p, "out", parts) for p in qkv),
        *(Cut(p, "out", optional=True) for p in optional),
        Cut(out, "in"),
    )
    return Block("heads", path, cuts, head_dim, group, counts, widths, returns, cross)


def _bert_layers(layers: str = "encoder.layer") -> tuple[Stack, ...]:
    attention = _attention(
        "attention.self",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        "attention_head_size",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
    )
    return (Stack(layers, (attention,), _ffn("intermediate", "intermediate.dense", "output.dense")),)


def _vit_attention() -> Block:
    return _attention(
        "attention",
        ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
        "attention.o_proj",
        "head_dim",
        counts=("num_attention_heads",),
    )


def _bart_attention(path: str, cross: bool = False) -> Block:
    qkv = (f"{path}.q_proj", f"{path}.k_proj", f"{path}.v_proj")
    return _attention(path, qkv, f"{path}.out_proj", "head_dim", counts=("num_heads",), cross=cross)


def _t5_stacks(up: tuple[str, ...]) -> tuple[Stack, ...]:
    def attention(path: str, cross: bool = False) -> Block:
        qkv = (f"{path}.q", f"{path}.k", f"{path}.v")
        return _attention(
            path,
            qkv,
            f"{path}.o",
            "key_value_proj_dim",
            counts=("n_heads",),
            widths=("inner_dim",),
            returns=3,
            cross=cross,
        )

    def ffn(layer: str) -> Block:
        path = f"{layer}.DenseReluDense"
        return _ffn(path, tuple(f"{path}.{u}" for u in up), f"{path}.wo")

    self_attention = attention("layer.0.SelfAttention")
    cross_attention = attention("layer.1.EncDecAttention", cross=True)
    return (
        Stack("encoder.block", (self_attention,), ffn("layer.1")),
        Stack("decoder.block", (self_attention, cross_attention), ffn("layer.2"), optional=True),
    )


_MPNET_ATTENTION = _attention(
    "attention.attn",
    ("attention.attn.q", "attention.attn.k", "attention.attn.v"),
    "attention.attn.o",
    "attention_head_size",
    counts=("num_attention_heads",),
    widths=("all_head_size",),
    returns=1,
)
_DISTILBERT_ATTENTION = _attention(
    "attention",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin",
    "attention_head_size",
    counts=("n_heads",),
)
_DEBERTA_ATTENTION = _attention(
    "attention.self",
    ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    "attention.output.dense",
    "attention_head_size",
    counts=("num_attention_heads",),
    widths=("all_head_size",),
    optional=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
)
_MODERNBERT_ATTENTION = _attention("attn", ("attn.Wqkv",), "attn.Wo", "head_dim", parts=3)
_GPT2_ATTENTION = _attention(
    "attn", ("attn.c_attn",), "attn.c_proj", "head_dim", parts=3, counts=("num_heads",), widths=("split_size",)
)
_LLAMA_ATTENTION = _attention(
    "self_attn",
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj",
    "head_dim",
    group="num_key_value_groups",
)
_BART_STACKS = (
    Stack("encoder.layers", (_bart_attention("self_attn"),), _ffn("", "fc1", "fc2")),
    Stack(
        "decoder.layers",
        (_bart_attention("self_attn"), _bart_attention("encoder_attn", cross=True)),
        _ffn("", "fc1", "fc2"),
    ),
)
_VIT_LAYERS = (Stack("layers", (_vit_attention(),), _ffn("mlp", "mlp.fc1", "mlp.fc2")),)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("bert", ("bert",), _bert_layers()),
        Family("roberta", ("roberta",), _bert_layers()),
        Family("xlm-roberta", ("xlm-roberta",), _bert_layers()),
        Family("camembert", ("camembert",), _bert_layers()),
        Family("electra", ("electra",), _bert_layers()),
        Family(
            "mpnet",
            ("mpnet",),
            (Stack("encoder.layer", (_MPNET_ATTENTION,), _ffn("intermediate", "intermediate.dense", "output.dense")),),
            quirk="mpnet",
        ),
        Family(
            "distilbert",
            ("distilbert",),
            (Stack("transformer.layer", (_DISTILBERT_ATTENTION,), _ffn("ffn", "ffn.lin1", "ffn.lin2")),),
        ),
        Family(
            "deberta-v2",
            ("deberta-v2",),
            (
                Stack(
                    "encoder.layer", (_DEBERTA_ATTENTION,), _ffn("intermediate", "intermediate.dense", "output.dense")
                ),
            ),
        ),
        Family(
            "modernbert",
            ("modernbert",),
            (Stack("layers", (_MODERNBERT_ATTENTION,), _ffn("mlp", "mlp.Wi", "mlp.Wo", parts=2)),),
            norm="pre",
        ),
        Family("vit", ("vit",), _VIT_LAYERS, norm="pre", modality="image"),
        Family("deit", ("deit",), _VIT_LAYERS, norm="pre", modality="image"),
        Family(
            "dinov2",
            ("dinov2",),
            (Stack("encoder.layer", (_vit_attention(),), _ffn("mlp", "mlp.fc1", "mlp.fc2")),),
            norm="pre",
            modality="image",
        ),
        Family(
            "dinov2-swiglu",
            ("dinov2",),
            (
                Stack(
                    "encoder.layer",
                    (_vit_attention(),),
                    _ffn("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj"),
                ),
            ),
            norm="pre",
            modality="image",
        ),
        Family(
            "gpt2",
            ("gpt2",),
            (Stack("h", (_GPT2_ATTENTION,), _ffn("mlp", "mlp.c_fc", "mlp.c_proj")),),
            norm="pre",
        ),
        Family(
            "llama",
            ("llama",),
            (Stack("layers", (_LLAMA_ATTENTION,), _ffn("mlp", ("mlp.gate_proj", "mlp.up_proj"), "mlp.down_proj")),),
            norm="pre",
        ),
        Family("bart", ("bart",), _BART_STACKS),
        Family("t5", ("t5",), _t5_stacks(("wi",)), norm="pre", quirk="t5"),
        Family("t5-gated", ("t5",), _t5_stacks(("wi_0", "wi_1")), norm="pre", quirk="t5"),
    )
}


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
                heads.append(_site(layer, index, stack, block, family))
            neurons.append(_site(layer, index, stack, stack.ffn, family))
    if not neurons:
        raise UnsupportedModel(f"The {family.name} model has no layers at '{family.stacks[0].layers}'.")
    return Sites(family, tuple(heads), tuple(neurons))


def _site(layer: nn.Module, index: int, stack: Stack, block: Block, family: Family) -> Site:
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
    return Site(block, name, index, stack.layers, layer, module, output, tuple(cuts), units, width)


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
