from __future__ import annotations

import re
from pathlib import Path

import pytest

from secateur.costs import budget as module
from secateur.costs.analytic import LinearCost, macs, params, size_bytes
from secateur.costs.budget import Budget, Constraint, Term, constraints
from secateur.costs.latency import Curve, LatencyTable, Timing
from secateur.errors import InvalidBudget
from secateur.subnetwork import SubNetwork
from tests.conftest import tiny_model

TABLE = LatencyTable(
    2.0, (Curve((0, 4), (0.0, 2.0)),) * 3, (Curve((0, 48), (0.0, 1.0)),) * 3, Timing(11.0, 12.0, 10, 1, "float32", 1, 7)
)


@pytest.mark.parametrize(
    ("text", "terms"),
    [
        ("macs<=60%", [("macs", 60, "%")]),
        ("macs<=2.5G", [("macs", 2.5, "G")]),
        (" Params <= 15m , latency<=.5S", [("params", 15, "M"), ("latency", 0.5, "s")]),
        ("params<=15000000", [("params", 15e6, "")]),
        ("params<=1.5e7", [("params", 15e6, "")]),
        ("size<=20MB,encoder_params<=50 %", [("size", 20, "MB"), ("encoder_params", 50, "%")]),
        ("size<=20mib", [("size", 20, "MiB")]),
        ("latency<=12ms", [("latency", 12, "ms")]),
    ],
)
def test_parse(text: str, terms: list[tuple[str, float, str]]) -> None:
    assert Budget.parse(text).terms == tuple(Term(*term) for term in terms)


@pytest.mark.parametrize("text", ["macs<=60%", "macs<=2.5G,latency<=12ms", "size<=20MB,params<=15M"])
def test_describe_reads_back(text: str) -> None:
    budget = Budget.parse(text)
    assert budget.describe() == text
    assert Budget.parse(budget.describe()) == budget


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "budget is empty: write for example 'macs<=60%'"),
        (" , ", "budget is empty"),
        ("macs<=60%,", "empty part"),
        ("latency<=0ms", "'latency<=0ms' leaves nothing: the limit must be above 0"),
        ("macs<=abc", "'macs<=abc' cannot be read: write 'macs<=2.5G'"),
        ("macs<=-5%", "'macs<=-5%' cannot be read"),
        ("macs<=nan", "cannot be read"),
        ("macs>=60%", "cannot be read: write 'macs<=2.5G' or a share, 'macs<=60%'"),
        ("macs=60%", "cannot be read"),
        ("macs", "'macs' cannot be read"),
        ("60%", "Unknown budget '60%'"),
        ("flops<=60%", "Unknown budget 'flops<=60%': it limits one of macs, params, encoder_params, size, latency"),
        ("macs<=60%,MACs<=50%", "limits macs twice"),
        ("macs<=100%", "'macs<=100%' would cut nothing: shares are below 100%"),
        ("params<=150%", "would cut nothing"),
        ("latency<=12", "needs a unit of latency (us, ms, s or %), as in 'latency<=12ms'"),
        ("size<=20", "needs a unit of size"),
        ("macs<=12ms", "needs a unit of macs (K, M, G, T or %)"),
    ],
)
def test_unreadable_budgets(text: str, message: str) -> None:
    with pytest.raises(InvalidBudget, match=re.escape(message)) as caught:
        Budget.parse(text)
    assert "\n" not in str(caught.value)


def test_kinds() -> None:
    budget = Budget.parse("macs<=60%,latency<=12ms")
    assert budget.kinds == {"macs", "latency"}
    budget.check_kinds(("macs", "params", "latency"), "optin")
    with pytest.raises(InvalidBudget, match="optin takes no 'latency' budget: use macs, params"):
        budget.check_kinds(("macs", "params"), "optin")


def test_limits_by_hand() -> None:
    assert Term("macs", 60, "%").limit(200.0) == 120
    assert Term("macs", 2.5, "G").limit(1.0) == 2.5e9
    assert Term("size", 2, "MiB").limit(1.0) == 2 * 1024**2
    assert Term("size", 2, "MB").limit(1.0) == 2e6
    assert Term("latency", 0.5, "s").limit(1.0) == 500


@pytest.mark.parametrize("unit", ["%", "M", ""])
@pytest.mark.parametrize("cost", [1.0, 999.0, 1000.0, 123_456.0, 333_333_333.0, 0.29 * 7e8])
def test_nearest_feasible_is_rounded_up(unit: str, cost: float) -> None:
    full = 7e8
    term = Term("macs", 1, unit).at_least(cost, full)
    assert cost <= term.limit(full) <= 1.0101 * cost
    assert Budget.parse(str(term)).terms[0] == term


def test_shares_are_of_the_whole_model() -> None:
    model = tiny_model("bert")
    full = SubNetwork.full(model)
    for kind, cost in (("macs", macs(model, 2, 7)), ("params", params(model))):
        (found,) = constraints(Budget.parse(f"{kind}<=60%"), model, 2, 7)
        assert found.kind == kind
        assert found.cost == cost
        assert found.limit == pytest.approx(0.6 * cost.of(full))
    (size,) = constraints(Budget.parse("size<=70%"), model)
    assert size.cost.fixed > size_bytes(model).fixed  # the header of the file counts


def test_latency_uses_the_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "latency_table", lambda model, batch, tokens: TABLE)
    model = tiny_model("bert")
    (found,) = constraints(Budget.parse("latency<=50%"), model, 1, 7)
    assert found.limit == pytest.approx(5.5)
    assert not found.met_by(SubNetwork.full(model))
    with pytest.raises(
        InvalidBudget, match=re.escape("still costs 2.5ms. The nearest feasible budget is latency<=2.5ms")
    ):
        constraints(Budget.parse("latency<=2ms"), model, 1, 7)


@pytest.mark.parametrize(
    "text", ["macs<=0.1%", "macs<=1K", "params<=1%", "encoder_params<=1%", "size<=1KB", "size<=0.5%"]
)
def test_infeasible_states_the_nearest_feasible(text: str) -> None:
    model = tiny_model("bert")
    with pytest.raises(InvalidBudget, match="cannot be met") as caught:
        constraints(Budget.parse(text), model, 1, 7)
    assert "\n" not in str(caught.value)
    nearest = str(caught.value).rsplit(" ", 1)[1].rstrip(".")
    kind, unit = text.split("<=")[0], re.sub(r"[\d.]", "", text.split("<=")[1])
    assert nearest.startswith(f"{kind}<=")
    assert nearest.endswith(unit)
    (found,) = constraints(Budget.parse(nearest), model, 1, 7)
    one_head = SubNetwork(((True, False, False, False), (False,) * 4, (False,) * 4), ((False,) * 48,) * 3)
    assert found.met_by(one_head)
    assert found.limit < 1.02 * found.cost.of(one_head)


def test_budget_already_met() -> None:
    model = tiny_model("bert")
    has = params(model).of(SubNetwork.full(model))
    with pytest.raises(InvalidBudget, match="meets params<=1G .* nothing to cut"):
        constraints(Budget.parse("params<=1G"), model)
    with pytest.raises(InvalidBudget, match="nothing to cut"):
        constraints(Budget.parse(f"params<={has:.0f},size<=1GB"), model)
    assert len(constraints(Budget.parse(f"params<={has - 1:.0f},size<=1GB"), model)) == 2


def test_nothing_left_to_cut() -> None:
    cost = LinearCost(100.0, (10.0,), (1.0,))
    constraint = Constraint("params", 50.0, cost)
    with pytest.raises(
        InvalidBudget, match="params<=50 cannot be met: this model costs 110 and has nothing left to cut"
    ):
        module.check_feasible(constraint, SubNetwork(((True,),), ((),)))


def test_every_kind_resolves_on_every_family(family: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = tiny_model(family)
    text = "macs<=80%,params<=90%,encoder_params<=80%,size<=90%"
    found = constraints(Budget.parse(text), model, 1, 7)
    assert [c.kind for c in found] == ["macs", "params", "encoder_params", "size"]
