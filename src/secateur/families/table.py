"""The table of architectures: data, written once per architecture.

To add one, add an entry to `FAMILIES`; the contract suite proves it.
"""

from __future__ import annotations

from secateur.families.spec import Block, Cut, Family, Stack


def _ffn(path: str, up: str | tuple[str, ...], down: str, parts: int = 1, norm: str = "") -> Block:
    ups = (up,) if isinstance(up, str) else up
    return Block("neurons", path, (*(Cut(u, "out", parts) for u in ups), Cut(down, "in")), norm=norm)


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
    norm: str = "",
) -> Block:
    cuts = (
        *(Cut(p, "out", parts) for p in qkv),
        *(Cut(p, "out", optional=True) for p in optional),
        Cut(out, "in"),
    )
    return Block("heads", path, cuts, head_dim, group, counts, widths, returns, cross, norm)


_BERT_FFN = _ffn("intermediate", "intermediate.dense", "output.dense", norm="output.LayerNorm")


def _bert_layers(layers: str = "encoder.layer") -> tuple[Stack, ...]:
    attention = _attention(
        "attention.self",
        ("attention.self.query", "attention.self.key", "attention.self.value"),
        "attention.output.dense",
        "attention_head_size",
        counts=("num_attention_heads",),
        widths=("all_head_size",),
        norm="attention.output.LayerNorm",
    )
    return (Stack(layers, (attention,), _BERT_FFN),)


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
    norm = f"{path}_layer_norm"
    return _attention(path, qkv, f"{path}.out_proj", "head_dim", counts=("num_heads",), cross=cross, norm=norm)


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
    norm="attention.LayerNorm",
)
_DISTILBERT_ATTENTION = _attention(
    "attention",
    ("attention.q_lin", "attention.k_lin", "attention.v_lin"),
    "attention.out_lin",
    "attention_head_size",
    counts=("n_heads",),
    norm="sa_layer_norm",
)
_DEBERTA_ATTENTION = _attention(
    "attention.self",
    ("attention.self.query_proj", "attention.self.key_proj", "attention.self.value_proj"),
    "attention.output.dense",
    "attention_head_size",
    counts=("num_attention_heads",),
    widths=("all_head_size",),
    optional=("attention.self.pos_key_proj", "attention.self.pos_query_proj"),
    norm="attention.output.LayerNorm",
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
_BART_FFN = _ffn("", "fc1", "fc2", norm="final_layer_norm")
_BART_STACKS = (
    Stack("encoder.layers", (_bart_attention("self_attn"),), _BART_FFN),
    Stack(
        "decoder.layers",
        (_bart_attention("self_attn"), _bart_attention("encoder_attn", cross=True)),
        _BART_FFN,
    ),
)
_VIT_LAYERS = (Stack("layers", (_vit_attention(),), _ffn("mlp", "mlp.fc1", "mlp.fc2")),)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family("bert", ("bert",), _bert_layers(), plain_products=True),
        Family("roberta", ("roberta",), _bert_layers(), plain_products=True),
        Family("xlm-roberta", ("xlm-roberta",), _bert_layers(), plain_products=True),
        Family("camembert", ("camembert",), _bert_layers(), plain_products=True),
        Family("electra", ("electra",), _bert_layers(), plain_products=True),
        Family(
            "mpnet",
            ("mpnet",),
            (Stack("encoder.layer", (_MPNET_ATTENTION,), _BERT_FFN),),
            quirk="mpnet",
            plain_products=True,
        ),
        Family(
            "distilbert",
            ("distilbert",),
            (
                Stack(
                    "transformer.layer",
                    (_DISTILBERT_ATTENTION,),
                    _ffn("ffn", "ffn.lin1", "ffn.lin2", norm="output_layer_norm"),
                ),
            ),
            plain_products=True,
        ),
        Family(
            "deberta-v2",
            ("deberta-v2",),
            (Stack("encoder.layer", (_DEBERTA_ATTENTION,), _BERT_FFN),),
        ),
        Family(
            "modernbert",
            ("modernbert",),
            (Stack("layers", (_MODERNBERT_ATTENTION,), _ffn("mlp", "mlp.Wi", "mlp.Wo", parts=2)),),
            norm="pre",
        ),
        Family("vit", ("vit",), _VIT_LAYERS, norm="pre", modality="image", plain_products=True),
        Family("deit", ("deit",), _VIT_LAYERS, norm="pre", modality="image", plain_products=True),
        Family(
            "dinov2",
            ("dinov2",),
            (Stack("encoder.layer", (_vit_attention(),), _ffn("mlp", "mlp.fc1", "mlp.fc2")),),
            norm="pre",
            modality="image",
            plain_products=True,
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
