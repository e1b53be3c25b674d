from __future__ import annotations

import pytest
import torch

from secateur.costs.analytic import LinearCost
from secateur.methods.baselines import balanced_rate
from secateur.subnetwork import UnitScores


def test_balanced_rate_equals_score_per_cost() -> None:
    # heads: total score 2 at total cost 2 · 100; neurons: total score 6 at total cost 3 · 2
    scores = UnitScores([torch.tensor([1.5, 0.5])], [torch.tensor([1.0, 2.0, 3.0])])
    assert balanced_rate(scores, LinearCost(0.0, (100.0,), (2.0,))) == pytest.approx((6 / 6) / (2 / 200))
    assert balanced_rate(UnitScores([], [torch.ones(2)]), LinearCost(0.0, (), (2.0,))) == 1.0
