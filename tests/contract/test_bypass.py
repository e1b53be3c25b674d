"""Contract of bypassed blocks: a model that is only a sub-network of itself equals the one that is cut out."""

from __future__ import annotations

import copy
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import secateur.hub as hub
from secateur.edits import Bypass, Edit, Slice, apply_edits, edits_from_dicts
from secateur.errors import InvalidModel, SecateurError
from secateur.families import sites
from secateur.gates import can_stop, gates, only, prefixes
from secateur.subnetwork import SubNetwork
from tests.conftest import tiny_batch, tiny_model
from tests.contract.test_families import CUTS, cut, logits
from tests.contract.test_round_trip import auto_class


def cut_out(model: Any, sub: SubNetwork) -> Any:
    """A copy of a model that is the sub-network."""
    twin = copy.deepcopy(model)
    bypass = Bypass.of(twin, sub)
    edits: list[Edit] = [Slice(sub), *([bypass] if bypass else [])]
    apply_edits(twin, edits)
    hub.attach(twin, edits)
    return twin


@pytest.mark.parametrize("how", CUTS)
def test_only_a_sub_network_equals_what_is_cut_out(family: str, how: str, tmp_path: Path) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    sub = cut(model, how)
    before = logits(model, batch)
    with only(model, sub):
        masked = logits(model, batch)
    assert torch.equal(logits(model, batch), before)
    small = cut_out(model, sub)
    assert torch.allclose(masked, logits(small, batch), atol=1e-5)
    small.save_pretrained(tmp_path)
    again = auto_class(family).from_pretrained(tmp_path)
    assert torch.equal(logits(again, batch), logits(small, batch))
    assert hub.edits_of(again) == hub.edits_of(small)


def test_first_units_are_views_that_train_the_whole(family: str) -> None:
    """A block of its first units has the outputs and gradients of a gate, and every parameter keeps its place."""
    model, batch = tiny_model(family), tiny_batch(family)
    found = sites(model)
    first = [tuple(i < 1 + n % 3 for i in range(site.units)) for n, site in enumerate(found)]
    sub = SubNetwork(tuple(first[: len(found.heads)]), tuple(first[len(found.heads) :]))
    names = [name for name, _ in model.named_parameters()]
    outputs, gradients = [], []
    for way in ("views", "gates"):
        model.zero_grad()
        masks = sub.masks()
        with only(model, sub) if way == "views" else gates(model, *masks):
            outputs.append(model(**batch).logits)
        outputs[-1].square().sum().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    assert torch.allclose(*outputs, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names
    assert len(gradients[0]) == len(gradients[1])
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], atol=1e-3, rtol=1e-3), name
    assert [site.units for site in sites(model)] == [site.units for site in found]


def test_sub_networks_and_gates_nest() -> None:
    """An inner sub-network narrows what the outer one left; gates around and inside multiply what is there."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    full = SubNetwork.full(model)

    def neurons(count: int) -> SubNetwork:
        return SubNetwork(full.heads, tuple(tuple(i < count for i in range(48)) for _ in range(3)))

    def answer(*contexts: Any) -> torch.Tensor:
        with ExitStack() as stack, torch.no_grad():
            for context in contexts:
                stack.enter_context(context())
            return logits(model, batch)

    found = sites(model)
    few = answer(lambda: only(found, neurons(8)))
    assert not torch.allclose(few, answer(lambda: only(found, neurons(24))))
    for sizes in ((24, 8), (8, 24)):
        assert torch.equal(answer(*(lambda n=n: only(found, neurons(n)) for n in sizes)), few)
    with pytest.raises(SecateurError, match="which has 24"):  # resolved within, a block has what it has there
        answer(lambda: only(model, neurons(24)), lambda: only(model, neurons(8)))
    masks = [torch.linspace(0, 1, 48)] * 3

    def gated() -> Any:
        return gates(found, None, masks)

    wanted = answer(gated, lambda: only(found, neurons(8), views=False))
    assert torch.allclose(answer(gated, lambda: only(found, neurons(8))), wanted, atol=1e-6)
    assert torch.allclose(answer(lambda: only(found, neurons(8)), gated), wanted, atol=1e-6)
    assert all(parameter is not None for module in model.modules() for parameter in [getattr(module, "weight", 0)])


@pytest.mark.parametrize("how", CUTS)
def test_first_layers_are_found_on_the_way(family: str, how: str) -> None:
    """One pass gives the answers of each of a sub-network's prefixes, and computes every layer once."""
    model, batch = tiny_model(family), tiny_batch(family)
    found, sub = sites(model), cut(model, how)
    if not can_stop(found):
        with pytest.raises(SecateurError, match="cannot be left out"), prefixes(found, sub):
            pass
        return
    wanted, calls = [], []
    for each in sub.prefixes():
        with only(found, each):
            wanted.append(logits(model, batch))
    handles = [s.output.register_forward_pre_hook(lambda *given: calls.append(1)) for s in found.neurons]
    with prefixes(found, sub) as run, torch.no_grad():
        answers = run(lambda: model(**batch).logits)
    assert len(calls) == len(wanted)
    for handle in handles:
        handle.remove()
    assert len(answers) == len(wanted)
    for answer, alone in zip(answers, wanted, strict=True):
        assert torch.allclose(answer, alone, atol=1e-6)
    assert not any("forward" in module.__dict__ for module in model.modules())


def test_prefixes_by_hand() -> None:
    full, none = (True, True), (False, False)
    sub = SubNetwork((full, none, full, none), (full, none, none, full))
    assert sub.prefixes() == [
        SubNetwork((full, none, none, none), (full, none, none, none)),
        SubNetwork((full, none, full, none), (full, none, none, none)),
        sub,
    ]
    empty = SubNetwork((none, none), (none, none))
    assert empty.prefixes() == [empty]


def test_first_units_cost_what_they_are() -> None:
    """Half of BERT's heads and neurons: half of the multiply-adds of its layers."""
    model, batch = tiny_model("bert"), tiny_batch("bert")
    half = SubNetwork(((True, True, False, False),) * 3, ((True,) * 24 + (False,) * 24,) * 3)

    def count(sub: SubNetwork) -> int:
        with FlopCounterMode(display=False) as counter, torch.no_grad(), only(model, sub):
            model.bert.encoder(model.bert.embeddings(batch["input_ids"]))
        return int(counter.get_total_flops())

    assert count(half) == count(SubNetwork.full(model)) // 2


def test_a_layer_without_both_blocks_is_not_there(family: str) -> None:
    """Bit by bit the model without that layer in its list; where the family shares a position bias, nearly."""
    model, batch = tiny_model(family), tiny_batch(family)
    found = sites(model)
    layer = found.neurons[1].layer_module
    full = SubNetwork.full(model)
    heads = tuple(
        tuple(kept and site.layer_module is not layer for kept in mask)
        for site, mask in zip(found.heads, full.heads, strict=True)
    )
    neurons = tuple((False,) * len(mask) if i == 1 else mask for i, mask in enumerate(full.neurons))
    with only(model, SubNetwork(heads, neurons)):
        masked = logits(model, batch)
    shorter = copy.deepcopy(model)
    del sites(shorter).neurons[1].layers[1]  # type: ignore[attr-defined]
    assert torch.allclose(masked, logits(shorter, batch), atol=1e-6)


def test_an_empty_block_is_the_identity_and_one_head_is_not() -> None:
    """BERT's layer without heads is its feed-forward block alone; a closed gate still adds a bias and normalises."""
    model: Any = tiny_model("bert")
    with torch.no_grad():
        for site in sites(model):
            site.output.bias.normal_()  # type: ignore[union-attr]
    full = SubNetwork.full(model)
    layer, x = model.bert.encoder.layer[0], torch.randn(2, 5, 32)
    without = SubNetwork(((False,) * 4, *full.heads[1:]), full.neurons)
    one = SubNetwork(((True, False, False, False), *full.heads[1:]), full.neurons)
    with torch.no_grad():
        with only(model, without):
            empty = layer(x)
        with only(model, one):
            single = layer(x)
        with gates(model, heads=[torch.zeros(4), None, None]):
            closed = layer(x)
        alone = layer.output(layer.intermediate(x), x)
    assert torch.equal(empty, alone)
    assert not torch.allclose(single, alone, atol=1e-3)
    assert not torch.allclose(closed, alone, atol=1e-3)


def test_a_bypass_takes_bias_and_norm_out_of_the_file() -> None:
    """32 + 2 * 32 parameters of an attention block of BERT besides its heads; a pre-norm model keeps its norm."""
    for family, gone in (("bert", 96), ("vit", 32)):
        model = tiny_model(family)
        full = SubNetwork.full(model)
        sub = SubNetwork(((False,) * 4, *full.heads[1:]), full.neurons)
        sliced = copy.deepcopy(model)
        Slice(sub).apply(sliced)
        count = sum(p.numel() for p in sliced.parameters()) - sum(p.numel() for p in cut_out(model, sub).parameters())
        assert count == gone


def test_only_leaves_no_trace_after_an_error(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    before, hooks = logits(model, batch), [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()]
    with pytest.raises(RuntimeError, match="on purpose"), only(model, cut(model, "layer without both")):
        raise RuntimeError("on purpose")
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()] == hooks
    assert torch.equal(logits(model, batch), before)


def test_what_cannot_be_bypassed_is_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(SecateurError, match="still has 4 heads: only empty blocks"):
        Bypass(("encoder.layer.0.attention.self",)).apply(model)
    with pytest.raises(SecateurError, match="no block 'nowhere' to bypass; there are such as encoder"):
        Bypass(("nowhere",)).apply(model)
    with pytest.raises(SecateurError, match="names of blocks"):
        Bypass(())
    for bad in ({"type": "bypass"}, {"type": "bypass", "blocks": [1]}, {"type": "bypass", "blocks": ["a"], "b": 1}):
        with pytest.raises(InvalidModel, match="bypass edit cannot be read"):
            edits_from_dicts([bad])
    assert Bypass.of(model, SubNetwork.full(model)) is None
