"""Contract of the native engine on ModernBERT: norms before blocks, rotary positions, windows and gated neurons."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ModernBertConfig, ModernBertForSequenceClassification, ModernBertForTokenClassification

import secateur
from secateur.errors import InvalidData, UnsupportedModel
from secateur.runtime import Precision, load
from tests.conftest import tiny_model
from tests.contract.test_bypass import cut_out
from tests.contract.test_engine import LISTS, NATIVE, TIERS, alone, cosine, examples
from tests.contract.test_families import cut

SPECIAL = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)
BIASES = dict(norm_bias=True, attention_bias=True, mlp_bias=True, classifier_bias=True)
WINDOWS = (16, 128)
LENGTHS = [1, 2, 7, 8, 9, 10, 17, 31, 33, 63, 64, 65, 66, 127, 128, 129, 130, 193, 255, 256, 257, 299, 300]


def modern(seed: int = 0, kind: Any = ModernBertForSequenceClassification, **changes: Any) -> Any:
    """A ModernBERT whose second layer is local, with weights that make every unit, norm and bias matter."""
    torch.manual_seed(seed)
    settings = dict(vocab_size=99, hidden_size=128, num_hidden_layers=3, num_attention_heads=4, intermediate_size=200)
    config = ModernBertConfig(**settings | SPECIAL | {"num_labels": 3, "max_position_embeddings": 512} | changes)
    model = kind(config).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.09)
    return model


@lru_cache
def across(window: int) -> tuple[Any, list[list[int]], Tensor]:
    """A model whose heads fit into tiles, examples shorter and longer than its window, and what it says of each."""
    model = modern(hidden_size=64, num_attention_heads=2, intermediate_size=96, local_attention=window)
    rows = examples(LENGTHS)
    return model, rows, alone(model, rows)


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("window", WINDOWS)
def test_lengths_across_the_window(window: int, tier: str) -> None:
    """The model's logits at every length, the same in one thread and in two, and whatever the other examples are."""
    model, rows, wanted = across(window)
    for precision in ("fp32", "int8") if tier != "torch" else ("fp32",):
        with load(model, precision, tier=tier, threads=1) as engine:
            found = engine(rows)
            assert (found - wanted).abs().max() <= (1e-4 if precision == "fp32" else 0.15 * wanted.abs().max())
            singly = torch.cat([engine([row]) for row in rows])
            assert (found - singly).abs().max() <= (1e-5 if precision == "fp32" else 0.05)
            engine.threads = 2
            assert torch.equal(engine(rows), found)


def test_every_length() -> None:
    model = modern(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, local_attention=128)
    rows = examples(list(range(1, 301)))
    assert (load(model, "fp32")(rows) - alone(model, rows)).abs().max() <= 1e-4


def test_a_window_of_a_long_example() -> None:
    """Far more keys than a query of the local layer sees, in every tier."""
    model = modern(hidden_size=64, num_hidden_layers=2, num_attention_heads=2, local_attention=32)
    model.config.max_position_embeddings = 2048
    rows = examples([1500, 3])
    wanted = alone(model, rows)
    for tier in TIERS:
        assert (load(model, "fp32", tier=tier)(rows) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("tier", NATIVE)
@pytest.mark.parametrize(("precision", "least"), [("fp32", 0.9999999), ("bf16", 0.9999), ("int8", 0.999)])
@pytest.mark.parametrize("width", [32, 64, 24, 6])
def test_precisions(tier: str, precision: Precision, least: float, width: int) -> None:
    """Heads of 32 and 64 entries go through tiles where there are some, others do not."""
    model = modern(hidden_size=192, num_attention_heads=192 // width, local_attention=32)
    rows = examples([9, 1, 17, 64, 33, 2, 128])
    with load(model, precision, tier=tier) as engine:
        found, wanted = engine(rows), alone(model, rows)
    assert cosine(found, wanted) >= least
    assert (found - wanted).abs().max() <= {"fp32": 1e-4, "bf16": 0.05, "int8": 0.15}[precision] * wanted.abs().max()


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("changes", [{}, BIASES], ids=["plain", "biases"])
@pytest.mark.parametrize("how", ["random", "layer without both", "bypassed"])
def test_cuts(how: str, changes: dict[str, bool], tier: str) -> None:
    """Uneven layers; an empty block adds its bias, and nothing where it has none or is bypassed."""
    model = modern(**changes)
    if how == "bypassed":
        model = cut_out(model, cut(model, "layer without both"))
    else:
        secateur.edits.apply_edits(model, [secateur.edits.Slice(cut(model, how))])
    rows = examples([9, 1, 30, 140])
    wanted = alone(model, rows)
    for precision, bound in (("fp32", 1e-4), ("bf16", 0.05), ("int8", 0.15)):
        with load(model, precision, tier=tier) as engine:  # type: ignore[arg-type]
            assert (engine(rows) - wanted).abs().max() <= (bound if bound < 1e-3 else bound * wanted.abs().max())


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("activation", ["gelu", "relu", "tanh"])
def test_heads(activation: str, pooling: str, tier: str) -> None:
    model = modern(classifier_pooling=pooling, classifier_activation=activation)
    rows = examples([9, 1, 20])
    assert (load(model, "fp32", tier=tier)(rows) - alone(model, rows)).abs().max() <= 1e-4


@pytest.mark.parametrize("tier", TIERS)
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_tokens_are_classified(pooling: str, tier: str) -> None:
    """By a head of its own for each token, which no pooling is meant for."""
    model = modern(kind=ModernBertForTokenClassification, classifier_pooling=pooling)
    rows = examples([9, 1, 20, 150])
    found = load(model, "fp32", tier=tier)(rows)
    assert [len(logits) for logits in found] == [9, 1, 20, 150]
    for logits, row in zip(found, rows, strict=True):
        assert (logits - alone(model, [row])[0]).abs().max() <= 1e-4


@pytest.mark.parametrize("activation", ["relu", "gelu_pytorch_tanh"])
@pytest.mark.parametrize("tier", TIERS)
def test_activations(tier: str, activation: str) -> None:
    model = modern(hidden_activation=activation)
    rows = examples([5, 40])
    assert (load(model, "fp32", tier=tier)(rows) - alone(model, rows)).abs().max() <= 1e-4


@pytest.mark.parametrize("tier", TIERS)
def test_rotary_positions_and_layers_are_those_of_the_config(tier: str) -> None:
    """Other angles in local and global layers, and any order of the two."""
    rope: dict[str, Any] = {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 50.0},
    }
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    model = modern(rope_parameters=rope, layer_types=kinds, local_attention=10)
    rows = examples([5, 90])
    wanted = alone(model, rows)
    assert (load(model, "fp32", tier=tier)(rows) - wanted).abs().max() <= 1e-4
    other = modern(layer_types=kinds, local_attention=10)
    assert (alone(other, rows) - wanted).abs().max() > 1e-2  # which the parameters decide


def test_zeros_are_weights_like_any() -> None:
    model: Any = tiny_model("modernbert")
    for parameter in model.model.layers.parameters():
        if parameter.dim() > 1:
            with torch.no_grad():
                parameter.mul_(torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)) < 0.3)
    secateur.sparsify(model)
    rows = examples([3, 20])
    assert (load(model, "fp32")(rows) - alone(model, rows)).abs().max() <= 1e-4


def test_an_engine_does_not_follow_its_model() -> None:
    model, rows = modern(), examples([5, 80])
    engine = load(model)
    before = engine(rows)
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            tensor.zero_()
    assert torch.equal(engine(rows), before)


def test_int8_holds_a_byte_for_each_weight() -> None:
    model = modern(intermediate_size=256)
    weights = 3 * (4 * 128 * 128 + 3 * 128 * 256)
    small = 3 * 12 * (3 * 128 + 128 + 2 * 256 + 128)  # bias, scale and sum of each output
    assert load(model, "int8").info()["bytes"] == weights + small + LISTS + 3 * 128  # the gates' own


@pytest.mark.parametrize("tier", ["portable", "torch"])
def test_the_config_bounds_the_length(tier: str) -> None:
    engine = load(modern(max_position_embeddings=40), "fp32", tier=tier)
    assert engine(examples([40])).shape == (1, 3)
    with pytest.raises(InvalidData, match="1 to 40 tokens"):
        engine(examples([41]))


def test_what_cannot_be_run_is_refused() -> None:
    stretched = {"rope_type": "yarn", "factor": 2.0, "rope_theta": 10_000.0}
    model = modern(
        rope_parameters={"full_attention": stretched, "sliding_attention": stretched | {"rope_theta": 100.0}}
    )
    with pytest.raises(UnsupportedModel, match="types default, linear, llama3, not 'yarn'"):
        load(model)
    with pytest.raises(UnsupportedModel, match="heads with gelu, relu or tanh, not 'silu'"):
        load(modern(classifier_activation="silu"))
    with pytest.raises(UnsupportedModel, match="activations gelu"):
        load(modern(hidden_activation="silu"))
    with pytest.raises(UnsupportedModel, match="classifiers of sequences and tokens, not ModernBertModel"):
        load(modern().model)
