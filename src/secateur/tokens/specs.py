"""How each family hands tokens from layer to layer: data, written once per family."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Carried = Literal["rotary", "pair_bias", "pair_index"]


@dataclass(frozen=True)
class TokenSpec:
    """Where tokens can leave a layer between its attention and its feed-forward block. Paths are relative to the layer.

    Attributes:
        residual: post-norm families: the module whose (first) output is the residual stream after attention. It is
            shortened there, so that the feed-forward block sees the kept tokens only.
        ffn_norm, ffn: pre-norm families: the norm before the feed-forward block, whose output is shortened, and the
            block itself, whose output is put back at its places, since the residual sum is out of a hook's reach; the
            layer's output is shortened.
        probabilities: the dropout module that attention's softmax goes through, for families that do not call
            transformers' attention interface; they run padded only.
        values: the linear layer that makes the values, for those families.
        carried: inputs of a layer that belong to token positions, and what they are: `rotary` is (cos, sin), each
            (1 or batch, tokens, width); `pair_bias` (batch, heads, queries, keys) is added to attention's logits;
            `pair_index` (1, queries, keys) numbers relative positions.
        causal: a decoder: tokens of the prompt are eliminated, and each layer's key-value cache is as long as what
            enters it.
    """

    residual: str = ""
    ffn_norm: str = ""
    ffn: str = ""
    probabilities: str = ""
    values: str = ""
    carried: tuple[tuple[str, Carried], ...] = ()
    causal: bool = False


_BERT = TokenSpec(residual="attention")

TOKEN_SPECS: dict[str, TokenSpec] = {
    "bert": _BERT,
    "roberta": _BERT,
    "xlm-roberta": _BERT,
    "camembert": _BERT,
    "electra": _BERT,
    "distilbert": TokenSpec(residual="sa_layer_norm"),
    "mpnet": TokenSpec(
        residual="attention",
        probabilities="attention.attn.dropout",
        values="attention.attn.v",
        carried=(("position_bias", "pair_bias"),),
    ),
    "deberta-v2": TokenSpec(
        residual="attention",
        probabilities="attention.self.dropout",
        values="attention.self.value_proj",
        carried=(("relative_pos", "pair_index"),),
    ),
    "modernbert": TokenSpec(ffn_norm="mlp_norm", ffn="mlp", carried=(("position_embeddings", "rotary"),)),
    "gpt2": TokenSpec(ffn_norm="ln_2", ffn="mlp", causal=True),
    "llama": TokenSpec(
        ffn_norm="post_attention_layernorm", ffn="mlp", carried=(("position_embeddings", "rotary"),), causal=True
    ),
}
"""By name of the family in `families.FAMILIES`."""
