"""Peak memory: by hand on small computations, and of sub-networks against what they are when cut out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import secateur
from secateur.costs.analytic import size_bytes
from secateur.costs.budget import Budget, constraints
from secateur.costs.memory import activation_bytes, peak_memory, peak_of
from secateur.errors import InvalidBudget
from secateur.methods.nas import Nas
from secateur.optimize.allocate import allocate
from secateur.prune import cut_out
from secateur.subnetwork import SubNetwork, UnitScores
from tests.conftest import tiny_model
from tests.contract.test_methods import tiny_task, tiny_tokenizer
from tests.contract.test_nas import NAS


def test_the_peak_by_hand() -> None:
    """Four rows of 100 floats before and after a ReLU are alive together; the weights, and views, count nothing."""
    model, x = nn.Sequential(nn.Linear(10, 100), nn.ReLU(), nn.Linear(100, 10)), torch.zeros(4, 10)
    with torch.inference_mode():
        assert peak_of(lambda: model(x), (*model.parameters(), x)) == 2 * 4 * 100 * 4

    def compute() -> None:
        a = torch.zeros(100)  # 400 bytes
        b = a + 1  # and 400 more
        del a
        c = b[10:]  # a view
        d = c * 2  # 360
        del b, c, d
        torch.zeros(90)

    assert peak_of(compute) == 800


@pytest.mark.parametrize("family", ["bert", "distilbert", "vit", "gpt2"])
def test_a_sub_network_has_the_peak_of_what_is_cut_out(family: str) -> None:
    model = tiny_model(family)
    cost, full = peak_memory(model, 2, 16), SubNetwork.full(model)
    whole = cost.of(full)
    assert whole > sum(p.numel() * p.element_size() for p in model.parameters())
    half = SubNetwork(
        tuple(tuple(i < len(mask) // 2 for i in range(len(mask))) for mask in full.heads),
        tuple(tuple(i < len(mask) // 4 for i in range(len(mask))) for mask in full.neurons),
    )
    found = cost.of(half)
    cut_out(model, half)
    stored = size_bytes(model).of(SubNetwork.full(model))
    assert found == stored + activation_bytes(model, 2, 16) < whole


def test_more_tokens_take_more() -> None:
    model = tiny_model("bert")
    assert activation_bytes(model, 1, 32) > 1.8 * activation_bytes(model, 1, 16)


def test_a_search_aims_at_memory_and_nothing_else_does() -> None:
    model = tiny_model("bert")
    common = {"task": tiny_task(), "tokenizer": tiny_tokenizer()}
    found = secateur.search(model, Nas(**NAS), objectives="error,memory", budget="memory<=80%", **common)  # type: ignore[arg-type]
    most = 0.8 * found.dense["costs"]["memory"]
    assert all(point.costs["memory"] <= most for point in found.pareto())
    result = secateur.compress(model, Nas(**NAS), budget="memory<=70%", seconds=0.02, **common)  # type: ignore[arg-type]
    (term,) = result.budget["terms"]
    assert term["met"]
    length = result.latency_setting["tokens"]
    stored = sum(t.numel() * t.element_size() for t in result.model.state_dict().values())
    assert term["reached"] == stored + activation_bytes(result.model, 1, length)
    plan = secateur.api.plan(model, Nas(**NAS), budget="memory<=70%", **common)  # type: ignore[attr-defined]
    assert plan["limits"][0]["kind"] == "memory"
    with pytest.raises(InvalidBudget, match="ptf takes no 'memory' budget"):
        secateur.compress(model, "ptf", budget="memory<=70%", **common)  # type: ignore[arg-type]
    with pytest.raises(InvalidBudget, match=r"memory<=1% cannot be met.* nearest feasible budget is memory<="):
        secateur.search(model, Nas(**NAS), budget="memory<=1%", **common)  # type: ignore[arg-type]
    limits = constraints(Budget.parse("memory<=70%"), model, 1, 16)
    masks = SubNetwork.full(model).masks()
    with pytest.raises(InvalidBudget, match="no sum over blocks: only a search"):
        allocate(UnitScores(*masks), limits)
