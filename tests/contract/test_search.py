"""Contract of `search`: every encoder gives a front, a point cut out is the point searched, a folder opens again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

import secateur
from secateur.cli import app
from secateur.costs.analytic import params
from secateur.costs.latency import Timing
from secateur.errors import InvalidBudget, SecateurError
from secateur.families import sites
from secateur.front import Front, volumes
from secateur.gates import only
from secateur.methods.nas import Nas
from secateur.optimize.points import Point
from secateur.report import render
from secateur.report.front import keeps
from secateur.subnetwork import SubNetwork
from tests.conftest import ENCODERS, tiny_batch, tiny_model
from tests.contract.test_families import logits
from tests.contract.test_methods import tiny_task, tiny_tokenizer
from tests.contract.test_nas import NAS


def search(**given: Any) -> Front:
    settings = {"method": Nas(**NAS), "task": tiny_task(), "tokenizer": tiny_tokenizer(), "seconds": 0.02}
    return secateur.search(**{"model": tiny_model("bert"), **settings, **given})


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory) -> Front:
    """A front in a folder, by three objectives."""
    folder = tmp_path_factory.mktemp("front") / "front"
    search(method=Nas(**NAS | {"space": "medium"}), objectives="error, params,latency", out=folder)
    assert sorted(file.name for file in folder.iterdir()) == ["front.json", "report.html", "supernet"]
    return Front.load(folder)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_has_a_front_whose_points_can_be_cut_out(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = search(model=model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    points, batch = found.pareto(), tiny_batch(family)
    assert {point.number for point in points} == set(found.judged)
    for point in points:
        cut = found.extract(point, tmp_path / str(point.number))
        with only(sites(found.model), point.sub), torch.no_grad():
            wanted = logits(found.model, batch)
        assert torch.allclose(logits(cut, batch), wanted, atol=1e-5)
        assert params(cut).of(SubNetwork.full(cut)) == point.costs["params"] == sum(p.numel() for p in cut.parameters())
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(point.number))
        assert torch.equal(logits(again, batch), logits(cut, batch))


def test_what_a_front_says(front: Front) -> None:
    points = front.pareto()
    assert [point.costs["params"] for point in points] == sorted(point.costs["params"] for point in points)
    assert all(
        not (all(b.of(o) <= a.of(o) for o in front.objectives) and any(b.of(o) < a.of(o) for o in front.objectives))
        for a in points
        for b in front.points
    )
    assert front.knee() in points
    assert front.best("params<=60%").costs["params"] <= 0.6 * front.dense["costs"]["params"]
    assert front.best("macs<=60%,latency<=90%").error >= min(point.error for point in front.points)
    assert set(front.judged) == {point.number for point in points}
    for found in front.judged.values():
        mean, low, high = found["difference"]
        assert low <= mean <= high
        assert mean == pytest.approx(found["metrics"]["accuracy"] - front.dense["metrics"]["accuracy"])
        assert found["speed"] > 0
        assert found["latency_ms"]["n"] >= 10
    assert {"order", "train", "search", "judge", "time"} <= set(front.seconds)
    assert front.seconds["search"] == pytest.approx(front.points[-1].seconds, abs=0.01)


def test_the_volume_by_hand(front: Front) -> None:
    """Of the unit box: one point with half the cost and error 0.2, then one that adds a slab of 0.25 x 0.6."""
    one, two = ({"error": 0.2, "params": 50.0}, {"error": 0.4, "params": 25.0})

    class Fake:
        def __init__(self, values: dict[str, float]) -> None:
            self.of, self.costs = values.__getitem__, values

        beyond = Point.beyond

    worse = {"error": 0.4, "params": 60.0}
    points: Any = [Fake(one), Fake(worse), Fake(two), Fake(one)]
    dense = {"params": 100.0}
    assert volumes(points, ("error", "params"), dense, {}) == pytest.approx([0.4, 0.4, 0.55, 0.55])
    assert volumes(points, ("error", "params"), dense, {"params": 40.0}) == pytest.approx([0, 0, 0.45, 0.45])
    assert 0 < front.hypervolume() == front.to_dict()["volumes"][-1] < 1


def test_limits_hold_on_the_front() -> None:
    found = search(budget="params<=70%", objectives=["error", "macs"])
    limit = 0.7 * found.dense["costs"]["params"]
    assert found.limits == {"params": pytest.approx(limit)}
    assert all(point.costs["params"] <= limit for point in found.pareto())
    assert any(point.costs["params"] > limit for point in found.points)
    assert found.best("macs<=99%").costs["params"] <= limit  # the front's limits hold for what is picked, too
    assert search(budget="params<=1G", method=Nas(**NAS | {"evaluations": 4})).limits == {"params": 1e9}


def test_rows_that_were_searched_by_do_not_judge() -> None:
    """Without rows held out candidates are judged by validation: the front then by the test rows."""
    assert search(method=Nas(**NAS | {"holdout": 0.0})).task["split"] == "test"
    assert search().task["split"] == "validation"


def test_a_stopped_search_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the search, then while the front is judged: the same front, nothing evaluated twice."""
    usual, stops = secateur.cluster.evaluate_together, [-1]  # type: ignore[attr-defined]
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        if len(calls) == stops[-1]:
            raise KeyboardInterrupt
        calls.append(1)
        return usual(*given)

    monkeypatch.setattr("secateur.cluster.evaluate_together", counted)
    whole, needed = search(), len(calls)
    calls.clear()
    stops.append(4)
    with pytest.raises(KeyboardInterrupt):
        search(out=tmp_path / "front")
    stops.append(-1)

    def stop(*given: Any, **options: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("secateur.searching.paired_bootstrap", stop)
        search(out=tmp_path / "front", resume=True)
    resumed = search(out=tmp_path / "front", resume=True)
    assert len(calls) == needed
    assert [(p.number, p.sub, p.error) for p in resumed.points] == [(p.number, p.sub, p.error) for p in whole.points]
    assert resumed.judged == whole.judged
    assert not (tmp_path / "front.run").exists()


def test_the_command_line(tmp_path: Path, front: Front) -> None:
    folder, run = tmp_path / "front", CliRunner()
    front.save(folder)
    found = run.invoke(app, ["extract", str(folder), "--best", "params<=60%", "--out", str(tmp_path / "a"), "--json"])
    assert found.exit_code == 0, found.output
    record = json.loads(found.stdout)
    assert record["point"] == front.best("params<=60%").number
    assert (tmp_path / "a" / "README.md").is_file()
    knee = run.invoke(app, ["extract", str(folder), "--knee", "--out", str(tmp_path / "b")])
    assert f"point {front.knee().number}, " in knee.stdout
    page = run.invoke(app, ["report", str(folder), "--out", str(tmp_path / "page.html")])
    assert page.exit_code == 0, page.output
    assert "sub-networks to choose from" in page.stdout
    assert f"secateur extract {folder} --point" in (tmp_path / "page.html").read_text()


def test_what_a_point_keeps_in_words() -> None:
    def words(heads: tuple[int, ...], neurons: tuple[int, ...]) -> str:
        masks = [tuple(tuple(i < n for i in range(2000)) for n in counts) for counts in (heads, neurons)]
        return keeps(Point(0, SubNetwork(*masks), 0.1, {}))

    assert words((4, 4, 0), (1536, 1536, 0)) == "2 layers of 4 heads and 1,536 neurons"
    assert words((1, 0), (1, 0)) == "1 layer of 1 head and 1 neuron"
    assert words((4, 1), (0, 1200)) == "4 + 0; 1 + 1,200"
    assert words((0,), (0,)) == "no layers"


def test_a_page_shows_fronts_and_results_together(front: Front) -> None:
    result = secateur.compress(
        tiny_model("bert"),
        secateur.Ptf(batches=2, batch_size=8, multiple=8),
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget="macs<=70%",
        seconds=0.02,
    )
    page = render([front.to_dict(), result.to_dict(), front.to_dict()])
    for expected in ("1 result and 2 fronts", "trade-bytes-0", "f1-params", "f0-parallel", "Hypervolume over time"):
        assert expected in page
    damaged = front.to_dict()
    del damaged["points"][0]["costs"]
    with pytest.raises(SecateurError, match="damaged|cannot be read"):
        render([damaged])


def test_another_clock_does_not_mix_candidates_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Resumed on a machine that is slower by now: the same points with the same errors as without the stop."""
    given: dict[str, Any] = {"method": Nas(**NAS | {"space": "medium"}), "objectives": "error,latency"}
    given |= {"budget": "latency<=80%", "out": tmp_path / "front"}
    usual, calls = secateur.cluster.evaluate_together, []  # type: ignore[attr-defined]

    def counted(*rows: Any) -> Any:
        calls.append(1)
        if len(calls) == 9:
            raise KeyboardInterrupt
        return usual(*rows)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("secateur.cluster.evaluate_together", counted)
        search(**given)
    monkeypatch.setattr(
        "secateur.costs.latency.time_model", lambda *given, **options: Timing(99.0, 99.0, 10, 1, "float32", 1, 10)
    )
    resumed = search(**given, resume=True)
    judge = secateur.cluster.Judge  # type: ignore[attr-defined]
    held = secateur.methods.nas.held_out(tiny_task(), 0.2, 2048, 0)  # type: ignore[attr-defined]
    here = judge(resumed.model, held, secateur.methods.nas.batches(held, "validation", tiny_tokenizer()))  # type: ignore[attr-defined]
    assert [point.error for point in resumed.points] == pytest.approx([here.errors(p.sub)[-1] for p in resumed.points])
    assert max(point.costs["latency"] for point in resumed.points) < 50  # as it was timed at first


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "ptf"}, "ptf makes one model, not a front: search with nas"),
        ({"objectives": "error"}, "one or more other objectives"),
        ({"objectives": "error,energy"}, "no objective 'energy'"),
        ({"budget": "params<=1%"}, "nearest feasible budget"),
        ({"budget": "sparsity>=50%"}, "nas takes no 'sparsity' budget"),
        ({"resume": True}, "give out="),
    ],
)
def test_bad_questions(given: dict[str, Any], message: str) -> None:
    with pytest.raises(SecateurError, match=message):
        search(**given)


def test_bad_picks(front: Front, tmp_path: Path) -> None:
    with pytest.raises(InvalidBudget, match=r"counts macs, .*, latency, not 'bits'"):
        front.best("bits<=1")
    with pytest.raises(
        InvalidBudget, match=r"None of \d+ points is within params<=1%: point \d+ comes nearest with params"
    ):
        front.best("params<=1%")
    with pytest.raises(SecateurError, match="no point 999; those of the front are"):
        front.extract(999)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    with pytest.raises(SecateurError, match="holds something else"):
        front.extract(front.knee(), tmp_path / "full")
    tiny_model("bert").save_pretrained(tmp_path / "mine")
    with pytest.raises(SecateurError, match="holds something else"):
        front.extract(front.knee(), tmp_path / "mine")
    front.extract(front.knee(), tmp_path / "small")
    front.extract(front.pareto()[0], tmp_path / "small")  # an earlier point may be replaced
    assert json.loads((tmp_path / "small" / "point.json").read_text())["number"] == front.pareto()[0].number
    with pytest.raises(SecateurError, match="is no front"):
        Front.load(tmp_path)
    front.save(tmp_path / "front")
    record = json.loads((tmp_path / "front" / "front.json").read_text())
    for key in ("seconds", "dense", "command"):
        (tmp_path / "front" / "front.json").write_text(json.dumps({k: v for k, v in record.items() if k != key}))
        with pytest.raises(SecateurError, match="is damaged"):
            Front.load(tmp_path / "front")
    refused = CliRunner().invoke(app, ["extract", str(tmp_path), "--knee", "--point", "1"])
    assert isinstance(refused.exception, SecateurError)
    assert "one of --point NUMBER, --best BUDGET and --knee" in str(refused.exception)
