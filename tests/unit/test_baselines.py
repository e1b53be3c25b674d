from __future__ import annotations

import pytest
import torch
from torch import nn

from secateur.families import sites
from secateur.scores.baselines import local_scores, magnitude_scores, random_scores
from tests.conftest import tiny_batch, tiny_model


def test_random_scores_follow_the_seed() -> None:
    model = tiny_model("bert")
    a, b, c = random_scores(model, 1), random_scores(model, 1), random_scores(model, 2)
    assert torch.equal(a.neurons[0], b.neurons[0])
    assert not torch.equal(a.neurons[0], c.neurons[0])
    assert not torch.equal(a.neurons[0], a.neurons[1])


def test_magnitude_of_a_neuron_and_a_head() -> None:
    model = tiny_model("bert")
    layer = model.bert.encoder.layer[1]
    scores = magnitude_scores(model)
    neuron = layer.intermediate.dense.weight[7].square().sum() + layer.output.dense.weight[:, 7].square().sum()
    assert float(scores.neurons[1][7]) == pytest.approx(neuron.sqrt().item(), rel=1e-6)
    rows = slice(16, 24)  # third head of width 8
    head = sum(m.weight[rows].square().sum() for m in (layer.attention.self.query, layer.attention.self.key))
    head = head + layer.attention.self.value.weight[rows].square().sum()
    head = head + layer.attention.output.dense.weight[:, rows].square().sum()
    assert float(scores.heads[1][2]) == pytest.approx(head.sqrt().item(), rel=1e-6)


def test_magnitude_of_fused_maps_and_grouped_heads() -> None:
    gpt2 = tiny_model("gpt2").transformer.h[0].attn
    fused = gpt2.c_attn.weight.view(32, 3, 4, 8)[:, :, 1].square().sum() + gpt2.c_proj.weight[8:16].square().sum()
    assert float(magnitude_scores(tiny_model("gpt2")).heads[0][1]) == pytest.approx(fused.sqrt().item(), rel=1e-6)
    llama = tiny_model("llama")
    attention = llama.model.layers[0].self_attn  # 8 query heads of width 4 in 4 groups
    grouped = attention.q_proj.weight[8:16].square().sum() + attention.k_proj.weight[4:8].square().sum()
    grouped = grouped + attention.v_proj.weight[4:8].square().sum() + attention.o_proj.weight[:, 8:16].square().sum()
    assert float(magnitude_scores(llama).heads[0][1]) == pytest.approx(grouped.sqrt().item(), rel=1e-6)


def test_local_scores_are_mean_squared_contributions() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    site, head = sites(model).neurons[1], sites(model).heads[1]
    seen = {}
    handles = [
        s.output.register_forward_pre_hook(lambda m, args, key=key: seen.__setitem__(key, args[0]))
        for key, s in (("neurons", site), ("heads", head))
    ]
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    scores = local_scores(model, [batch])
    real = batch["attention_mask"].bool()
    z = seen["neurons"][real][:, 3]
    expected = (z.square().mean() * site.output.weight[:, 3].square().sum()).item()
    assert float(scores.neurons[1][3]) == pytest.approx(expected, rel=1e-5)
    part = seen["heads"][real][:, 8:16] @ head.output.weight[:, 8:16].T
    assert float(scores.heads[1][1]) == pytest.approx(part.square().sum(1).mean().item(), rel=1e-5)


def test_local_scores_leave_padding_out() -> None:
    model, batch = tiny_model("bert"), tiny_batch("bert")
    padded = {name: nn.functional.pad(value, (0, 5)) for name, value in batch.items()}
    a, b = local_scores(model, [batch]), local_scores(model, [padded])
    assert torch.allclose(a.neurons[2], b.neurons[2], rtol=1e-4)
    assert torch.allclose(a.heads[2], b.heads[2], rtol=1e-4)


def test_every_family_has_baselines(family: str) -> None:
    model = tiny_model(family)
    found = sites(model)
    for scores in (magnitude_scores(model), local_scores(model, [tiny_batch(family)]), random_scores(model)):
        assert [len(h) for h in scores.heads] == [s.units for s in found.heads]
        assert [len(n) for n in scores.neurons] == [s.units for s in found.neurons]
        assert all(float(v.min()) >= 0 for v in (*scores.heads, *scores.neurons))
