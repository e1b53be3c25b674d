"""The words that an architecture is described in: cuts, blocks, stacks, families."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

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
        norm: where LayerNorm follows the residual sum, its path relative to the layer.
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
    norm: str = ""

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
        plain_products: whether maps give queries, keys and values as they are, attention is softmax(Q Kᵀ · scaling +
            mask) V, and one map leads into the neurons: what 1-bit operands are made for.
    """

    name: str
    model_types: tuple[str, ...]
    stacks: tuple[Stack, ...]
    norm: Literal["post", "pre"] = "post"
    modality: Literal["text", "image"] = "text"
    quirk: str = ""
    plain_products: bool = False
