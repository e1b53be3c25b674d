"""Contract of every family: masked equals sliced, gates leave no trace, slices compose."""

from __future__ import annotations

import copy

import pytest
import torch

from secateur.edits import Slice, apply_edits, merge
from secateur.errors import SecateurError, UnsupportedModel
from secateur.families import FAMILIES, family_of, sites
from secateur.gates import gates
from secateur.subnetwork import SubNetwork
from tests.conftest import TINY, tiny_batch, tiny_model

CUTS = ("random", "layer without heads", "layer without neurons", "layer without both", "nothing left but one head")


def cut(model: torch.nn.Module, how: str, seed: int = 0) -> SubNetwork:
    """A sub-network of the model: every unit is kept with probability one half, then some layers are emptied."""
    found = sites(model)
    generator = torch.Generator().manual_seed(seed)
    heads = [torch.rand(s.units, generator=generator) < 0.5 for s in found.heads]
    neurons = [torch.rand(s.units, generator=generator) < 0.5 for s in found.neurons]
    for mask in (*heads, *neurons):
        mask[:1] = True
    if how in ("layer without heads", "layer without both"):
        heads[0][:] = False
        heads[-1][:] = False
    if how in ("layer without neurons", "layer without both"):
        neurons[0][:] = False
        neurons[-1][:] = False
    if how.startswith("nothing"):
        for mask in (*heads, *neurons):
            mask[:] = False
        heads[1][2] = True
    return SubNetwork.from_masks(heads, neurons)


def logits(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch).logits


def test_every_family_has_a_tiny_model() -> None:
    assert set(TINY) == set(FAMILIES)


def test_family_is_found(family: str) -> None:
    model = tiny_model(family)
    assert family_of(model).name == family
    assert family_of(model.base_model).name == family


@pytest.mark.parametrize("how", CUTS)
def test_masked_equals_sliced(family: str, how: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    dense = logits(model, batch)
    sub = cut(model, how)
    heads, neurons = sub.masks()
    with gates(model, heads, neurons):
        masked = logits(model, batch)
    sliced = apply_edits(copy.deepcopy(model), [Slice(sub)])
    assert (logits(sliced, batch) - masked).abs().max() <= 1e-5
    assert (dense - masked).abs().max() > 1e-3  # negative control: the cut matters
    assert sum(p.numel() for p in sliced.parameters()) < sum(p.numel() for p in model.parameters())
    assert [s.units for s in sites(sliced).heads] == list(sub.head_widths)
    assert [s.units for s in sites(sliced).neurons] == list(sub.neuron_widths)


def test_one_more_neuron_differs(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    sub = cut(model, "random")
    less = [list(mask) for mask in sub.neurons]
    less[0][less[0].index(True)] = False
    other = SubNetwork(sub.heads, tuple(tuple(mask) for mask in less))
    a = apply_edits(copy.deepcopy(model), [Slice(sub)])
    b = apply_edits(copy.deepcopy(model), [Slice(other)])
    assert (logits(a, batch) - logits(b, batch)).abs().max() > 1e-5


def test_gates_leave_no_trace(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    dense = logits(model, batch)
    heads, neurons = cut(model, "random").masks()
    with pytest.raises(RuntimeError, match="on purpose"), gates(model, heads, neurons):
        logits(model, batch)
        raise RuntimeError("on purpose")
    assert torch.equal(logits(model, batch), dense)
    assert not any(m._forward_pre_hooks for m in model.modules())
    ones = SubNetwork.full(model).masks()
    with gates(model, *ones):
        assert torch.equal(logits(model, batch), dense)


def test_nested_and_batched_gates(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    a, b = cut(model, "random", seed=1).masks(), cut(model, "random", seed=2).masks()
    both = tuple([x * y for x, y in zip(m, n, strict=True)] for m, n in zip(a, b, strict=True))
    with gates(model, *both):
        expected = logits(model, batch)
    with gates(model, *a), gates(model, *b):
        assert (logits(model, batch) - expected).abs().max() <= 1e-5
    per_example = [[mask.expand(3, -1) for mask in kind] for kind in both]
    with gates(model, *per_example):
        assert (logits(model, batch) - expected).abs().max() <= 1e-5


def test_slices_compose(family: str) -> None:
    model, batch = tiny_model(family), tiny_batch(family)
    first = Slice(cut(model, "random", seed=3))
    twice = apply_edits(copy.deepcopy(model), [first])
    second = Slice(cut(twice, "random", seed=4))
    apply_edits(twice, [second])
    merged = merge([first, second])
    assert len(merged) == 1
    once = apply_edits(copy.deepcopy(model), merged)
    assert torch.equal(logits(twice, batch), logits(once, batch))


def test_generation_with_cache_after_slice(family: str) -> None:
    if TINY[family][1] not in ("CausalLM", "Seq2SeqLM"):
        return
    model, batch = tiny_model(family), tiny_batch(family)
    apply_edits(model, [Slice(cut(model, "layer without heads"))])
    prompt = {"input_ids": batch["input_ids"][1:], "attention_mask": batch["attention_mask"][1:]}
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    assert torch.equal(model.generate(**prompt, **options), model.generate(**prompt, use_cache=False, **options))


def test_wrong_shapes_are_refused() -> None:
    model = tiny_model("bert")
    with pytest.raises(SecateurError, match="lists 5 heads for 'encoder.layer.0.attention.self', which has 4"):
        sub = SubNetwork.full(model)
        apply_edits(model, [Slice(SubNetwork(((True,) * 5, *sub.heads[1:]), sub.neurons))])
    with pytest.raises(SecateurError, match="3 blocks"), gates(model, heads=[torch.ones(4)]):
        pass


def test_unknown_architecture_names_the_nearest() -> None:
    model = tiny_model("bert")
    model.config.model_type = "bertx"
    with pytest.raises(UnsupportedModel, match="nearest: 'bert'"):
        family_of(model)


def test_changed_architecture_names_the_missing_module() -> None:
    model = tiny_model("bert")
    del model.bert.encoder.layer[1].intermediate.dense
    with pytest.raises(UnsupportedModel, match=r"encoder\.layer\.1\.intermediate\.dense"):
        family_of(model)
