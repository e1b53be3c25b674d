"""Cuts with numbers worked out by hand."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.edits import Slice, apply_edits
from secateur.families import output_weight, sites
from secateur.gates import gates
from secateur.quirks import shorten, unit_index
from secateur.subnetwork import SubNetwork
from tests.conftest import tiny_batch, tiny_model


def test_unit_index_counts_through_fused_slabs() -> None:
    # q, k and v of three heads of width two, stacked: keep heads 0 and 2
    assert unit_index([0, 2], 3, 18, 3).tolist() == [0, 1, 4, 5, 6, 7, 10, 11, 12, 13, 16, 17]
    assert unit_index([], 3, 18, 3).tolist() == []
    assert unit_index([1], 4, 4, 1).tolist() == [1]


def test_linear_and_conv1d_are_shortened_alike() -> None:
    linear, conv = nn.Linear(3, 4), Conv1D(4, 3)
    with torch.no_grad():
        conv.weight.copy_(linear.weight.T)
        conv.bias.copy_(linear.bias)
    x = torch.randn(2, 3)
    expected = linear(x)[:, [1, 3]]
    shorten(linear, 0, torch.tensor([1, 3]), bias=True)
    shorten(conv, 1, torch.tensor([1, 3]), bias=True)
    assert torch.equal(linear(x), expected)
    assert torch.allclose(conv(x), expected, atol=1e-6)
    assert (linear.out_features, conv.nf) == (2, 2)


def test_frozen_parameters_stay_frozen() -> None:
    linear = nn.Linear(3, 4).requires_grad_(False)
    shorten(linear, 1, torch.tensor([0]), bias=False)
    assert not linear.weight.requires_grad
    assert linear.bias.shape == (4,)


def test_a_gate_removes_exactly_one_head_of_the_output_projection() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    site = sites(model).heads[0]
    seen: list[torch.Tensor] = []
    site.output.register_forward_hook(lambda module, args, output: seen.append(output))
    context: list[torch.Tensor] = []
    site.output.register_forward_pre_hook(lambda module, args: context.append(args[0]))
    mask = torch.tensor([1.0, 0.0, 1.0, 1.0])
    with torch.no_grad():
        model(**batch)
        with gates(model, heads=[mask, None, None]):
            model(**batch)
    removed = context[0][..., 8:16] @ output_weight(site)[:, 8:16].T
    assert torch.allclose(seen[0] - seen[1], removed, atol=1e-6)


def test_gates_pass_gradients() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    masks = [torch.ones(4, requires_grad=True) for _ in range(3)]
    with gates(model, heads=masks):
        model(**batch).logits.sum().backward()
    assert all(mask.grad is not None and mask.grad.abs().min() > 0 for mask in masks)


def test_parameters_that_go_are_those_of_the_units() -> None:
    model = tiny_model("bert")
    before = sum(p.numel() for p in model.parameters())
    full = SubNetwork.full(model)
    sub = SubNetwork(((False, True, True, True), *full.heads[1:]), ((False, *full.neurons[0][1:]), *full.neurons[1:]))
    apply_edits(model, [Slice(sub)])
    # a head of width 8 at d = 32: 3·(8·32 + 8) + 32·8; a neuron: 32 + 1 + 32
    assert before - sum(p.numel() for p in model.parameters()) == 3 * (8 * 32 + 8) + 32 * 8 + 65


def test_slicing_works_on_the_meta_device() -> None:
    with torch.device("meta"):
        model = tiny_model_on_meta()
    full = SubNetwork.full(model)
    apply_edits(model, [Slice(SubNetwork(full.heads, ((True,) * 8 + (False,) * 40,) * 3))], empty=True)
    assert [s.units for s in sites(model).neurons] == [8, 8, 8]
    assert sites(model).neurons[0].output.weight.device.type == "meta"


def tiny_model_on_meta() -> nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    from tests.conftest import BERT

    return BertForSequenceClassification(BertConfig(**BERT))
