"""Analytic costs: exact against torch's FLOP counter, and by hand."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForSequenceClassification

from secateur.costs.analytic import LinearCost, encoder_params, file_bytes, macs, params, size_bytes
from secateur.costs.inputs import dummy_inputs, run
from secateur.edits import Slice, apply_edits
from secateur.errors import InvalidData
from secateur.families import sites
from secateur.subnetwork import SubNetwork
from tests.conftest import tiny_model


def halves(model: nn.Module, seed: int = 0, empty: bool = False) -> SubNetwork:
    """Half of the units at random; with `empty`, also a block without heads and one without neurons."""
    generator = torch.Generator().manual_seed(seed)
    found = sites(model)
    heads = [torch.rand(s.units, generator=generator) < 0.5 for s in found.heads]
    neurons = [torch.rand(s.units, generator=generator) < 0.5 for s in found.neurons]
    heads[-1][0] = True
    if empty:
        heads[0][:] = False
        neurons[-1][:] = False
    return SubNetwork.from_masks(heads, neurons)


def counted(model: nn.Module, batch: int, tokens: int) -> float:
    """MACs by torch's own counter, with plain attention: it does not know the CPU's fused kernel."""
    model = copy.deepcopy(model).requires_grad_(False)
    model.set_attn_implementation("eager")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run(model, dummy_inputs(model, batch, tokens))
    return counter.get_total_flops() / 2


@pytest.mark.parametrize("empty", [False, True])
def test_costs_equal_those_of_the_sliced_model(family: str, empty: bool) -> None:
    model = tiny_model(family)
    sub = halves(model, empty=empty)
    sliced = apply_edits(copy.deepcopy(model), [Slice(sub)])
    full = SubNetwork.full(model)
    cost = macs(model, 2, 7)
    assert cost.of(full) == counted(model, 2, 7)
    assert cost.of(sub) == counted(sliced, 2, 7)
    assert macs(sliced, 2, 7).of(SubNetwork.full(sliced)) == cost.of(sub)
    assert params(model).of(full) == sum(p.numel() for p in model.parameters())
    assert params(model).of(sub) == sum(p.numel() for p in sliced.parameters())
    layers = {site.layer_module for site in sites(sliced)}
    assert encoder_params(model).of(sub) == sum({p: p.numel() for m in layers for p in m.parameters()}.values())
    assert size_bytes(model).of(sub) == size_bytes(sliced).of(SubNetwork.full(sliced))


@pytest.mark.parametrize("name", ["bert", "modernbert", "vit", "llama", "bart", "t5"])
def test_macs_do_not_depend_on_the_attention_kernel(name: str) -> None:
    model = tiny_model(name)
    assert model.config._attn_implementation == "sdpa"
    fused = macs(model, 2, 7)
    model.set_attn_implementation("eager")
    assert macs(model, 2, 7) == fused


def test_bert_base_by_the_published_formula() -> None:
    config = BertConfig(num_hidden_layers=1, vocab_size=100)
    cost = macs(BertForSequenceClassification(config), 1, 128)
    assert cost.heads == (27_262_976,)
    assert cost.neurons == (196_608,)
    layer = 12 * cost.heads[0] + 3072 * cost.neurons[0]
    assert layer == 931_135_488
    assert 12 * layer == 11_173_625_856
    assert cost.fixed == 768 * 768 + 768 * 2  # pooler and classifier read one token


def test_tiny_bert_by_hand() -> None:
    cost = macs(tiny_model("bert"), 2, 7)
    assert cost.heads == (2 * (4 * 7 * 32 * 8 + 2 * 7 * 7 * 8),) * 3
    assert cost.neurons == (2 * 2 * 7 * 32,) * 3


def test_grouped_query_attention_by_hand() -> None:
    # a unit is a group: 2 query heads with their output columns, 1 key head, 1 value head, each 4 wide
    cost = macs(tiny_model("llama"), 2, 7)
    assert cost.heads[0] == 2 * (7 * 32 * (2 * 4 + 4 + 4 + 2 * 4) + 2 * 2 * 7 * 7 * 4)
    assert cost.neurons[0] == 2 * 3 * 7 * 32


def test_deberta_position_terms_by_hand() -> None:
    # 16 relative positions: projected once for c2p and once for p2c, then multiplied with every query and every key
    cost = macs(tiny_model("deberta-v2"), 2, 7)
    plain = 2 * (4 * 7 * 32 * 8 + 2 * 7 * 7 * 8)
    assert cost.heads[0] == plain + 2 * 16 * 32 * 8 + 2 * 2 * 7 * 16 * 8


def test_unit_params_by_hand() -> None:
    model = tiny_model("bert")
    assert params(model).heads[0] == 4 * 32 * 8 + 3 * 8
    assert params(model).neurons[0] == 2 * 32 + 1
    assert size_bytes(model).neurons[0] == 4 * (2 * 32 + 1)
    assert size_bytes(copy.deepcopy(model).bfloat16()).neurons[0] == 2 * (2 * 32 + 1)


def test_tied_weights_count_once() -> None:
    model = tiny_model("gpt2")
    assert model.lm_head.weight is model.transformer.wte.weight
    expected = sum(p.numel() for p in model.parameters())
    assert params(model).of(SubNetwork.full(model)) == expected
    assert size_bytes(model).of(SubNetwork.full(model)) == 4 * expected


def test_file_bytes_bound_the_file(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    model.save_pretrained(tmp_path)
    file = (tmp_path / "model.safetensors").stat().st_size
    full = SubNetwork.full(model)
    assert size_bytes(model).of(full) < file <= file_bytes(model).of(full) < 1.05 * file


def test_linear_cost_by_hand() -> None:
    cost = LinearCost(10.0, (3.0, 5.0), (0.5,))
    sub = SubNetwork(((True, False), (True, True)), ((True, True, False),))
    assert cost.of(sub) == 10 + 3 + 2 * 5 + 2 * 0.5
    assert cost.block("heads", 1, [0, 2]) == [0, 10]


def test_counting_leaves_no_trace() -> None:
    model = tiny_model("bert").train()
    model.bert.pooler.eval()
    macs(model, 1, 5)
    assert model.training
    assert model.bert.encoder.layer[0].training
    assert not model.bert.pooler.training
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    with torch.inference_mode():
        assert macs(model, 1, 5) == macs(model, 1, 5)


def test_dummy_inputs() -> None:
    model = tiny_model("bart")
    inputs = dummy_inputs(model, 2, 11)
    assert {name: tuple(t.shape) for name, t in inputs.items()} == {
        "input_ids": (2, 11),
        "attention_mask": (2, 11),
        "decoder_input_ids": (2, 11),
    }
    assert bool(inputs["attention_mask"].all())
    assert not set(inputs["input_ids"][:, :-1].flatten().tolist()) & {0, 1, 2}
    assert inputs["input_ids"][:, -1].tolist() == [2, 2]
    assert torch.equal(dummy_inputs(model, 2, 11)["input_ids"], inputs["input_ids"])
    assert dummy_inputs(tiny_model("vit"), 3, 1)["pixel_values"].shape == (3, 3, 32, 32)


@pytest.mark.parametrize(("name", "positions"), [("bert", 64), ("roberta", 63), ("gpt2", 64), ("bart", 64)])
def test_more_tokens_than_positions(name: str, positions: int) -> None:
    model = tiny_model(name)
    run(model, dummy_inputs(model, 1, positions))
    with pytest.raises(InvalidData, match=f"tokens={positions + 1} is more than this model's {positions} positions"):
        macs(model, 1, positions + 1)


def test_empty_inputs_are_refused() -> None:
    with pytest.raises(InvalidData, match="batch=0"):
        dummy_inputs(tiny_model("bert"), 0, 5)
