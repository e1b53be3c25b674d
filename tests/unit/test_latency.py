from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import nn

from secateur.costs import latency
from secateur.costs.latency import Curve, LatencyTable, Timing, grid, latency_table, monotone
from secateur.families import sites
from secateur.subnetwork import SubNetwork
from tests.conftest import tiny_model

TIMING = Timing(20.0, 22.0, 10, 1, "float32", 1, 7)


class FakeSampler:
    """Stands in for the timer: milliseconds follow from a runner's name. Runs every runner once, to see that it can."""

    def __init__(self) -> None:
        self.names: list[list[str]] = []

    def __call__(
        self, runners: Mapping[str, Callable[[], object]], seconds: float, min_runs: int
    ) -> dict[str, list[float]]:
        self.names.append(list(runners))
        for runner in runners.values():
            runner()
        return {name: [self.ms(name)] * min_runs for name in runners}

    @staticmethod
    def ms(name: str) -> float:
        kind, *rest = name.split()
        if kind in ("full", "bare"):
            return {"full": 20.0, "bare": 8.0}[kind]
        return 1.0 if kind == "layer" else 1.0 + (0.5 if rest[-2] == "heads" else 0.0625) * int(rest[-1])


@pytest.fixture
def sampler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> FakeSampler:
    fake = FakeSampler()
    monkeypatch.setattr(latency, "sample", fake)
    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(latency, "time_model", lambda *args, **kwargs: TIMING)
    return fake


def test_curve_interpolates() -> None:
    curve = Curve((0, 64, 192), (0.0, 2.0, 3.0))
    assert [curve.at(w) for w in (0, 32, 64, 128, 192)] == [0.0, 1.0, 2.0, 2.5, 3.0]
    assert Curve((0,), (0.0,)).at(0) == 0.0


def test_monotone_by_hand() -> None:
    assert monotone([1.0, 3.0, 2.0, 4.0]) == [1.0, 2.5, 2.5, 4.0]
    assert monotone([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    assert monotone([1.0, 5.0, 3.0, 1.0, 9.0]) == [1.0, 3.0, 3.0, 3.0, 9.0]
    assert monotone([]) == []


def test_grid_lies_on_multiples_of_64() -> None:
    assert grid("neurons", 1536) == (0, 64, 256, 512, 768, 1024, 1280, 1536)
    assert grid("neurons", 100) == (0, 64, 100)
    assert grid("heads", 12) == (0, 1, 2, 4, 6, 8, 10, 12)
    assert grid("heads", 1) == (0, 1)
    assert grid("heads", 0) == (0,)


def test_table_by_hand(sampler: FakeSampler) -> None:
    # a layer adds 4 heads × 0.5 + 48 neurons × 0.0625 = 5 ms, three of them 15; the model has 20 - 8 = 12 to share
    model = tiny_model("bert")
    table = latency_table(model, 1, 7)
    assert table.fixed == pytest.approx(8.0)
    full = SubNetwork.full(model)
    assert table.of(full) == pytest.approx(20.0)
    assert table.heads[0].at(4) == pytest.approx(2.0 * 12 / 15)
    assert table.neurons[2].at(24) == pytest.approx(1.5 * 12 / 15)
    none = SubNetwork(((False,) * 4,) * 3, ((False,) * 48,) * 3)
    assert table.of(none) == pytest.approx(8.0)
    assert table.block("heads", 0, [0, 2]) == pytest.approx([0.0, 0.8])


def test_equal_layers_are_measured_once(sampler: FakeSampler) -> None:
    model = tiny_model("bert")
    latency_table(model, 1, 7)
    (names,) = sampler.names
    assert sum(name.startswith("layer") for name in names) == 1
    assert sum(name.startswith("block") for name in names) == len(grid("heads", 4)[1:]) + len(grid("neurons", 48)[1:])


def test_every_family_can_be_measured(family: str, sampler: FakeSampler) -> None:
    model = tiny_model(family).train()
    before = [p.clone() for p in model.parameters()]
    table = latency_table(model, 2, 7)
    assert table.of(SubNetwork.full(model)) == pytest.approx(20.0)
    assert model.training
    assert not any(m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert SubNetwork.full(model).keeps_everything
    assert len(table.heads) == len(sites(model).heads)


def test_prediction_never_falls_with_width(sampler: FakeSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    values = iter([3.0, 1.0, 2.0, 0.5, 4.0, 1.5] * 10)
    monkeypatch.setattr(
        FakeSampler, "ms", staticmethod(lambda name: {"full": 9.0, "bare": 2.0}.get(name) or next(values))
    )
    table = latency_table(tiny_model("bert"), 1, 7)
    for curve in (*table.heads, *table.neurons):
        points = [curve.at(w) for w in range(curve.widths[-1] + 1)]
        assert points == sorted(points)
        assert points[0] == 0.0


def test_second_call_reads_the_cache(sampler: FakeSampler) -> None:
    model = tiny_model("bert")
    first = latency_table(model, 1, 7)
    second = latency_table(model, 1, 7)
    assert len(sampler.names) == 1
    assert second.heads[0].ms == pytest.approx(first.heads[0].ms)
    latency_table(model, 1, 8)
    latency_table(model, 1, 7, refresh=True)
    assert len(sampler.names) == 3


def test_cached_table_is_scaled_to_today(sampler: FakeSampler, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("bert")
    first = latency_table(model, 1, 7)
    today = Timing(10.0, 11.0, 5, 1, "float32", 1, 7)
    monkeypatch.setattr(latency, "time_model", lambda *args, **kwargs: today)
    second = latency_table(model, 1, 7)
    assert second.full == today
    assert second.of(SubNetwork.full(model)) == pytest.approx(10.0)
    assert second.heads[0].ms == pytest.approx([ms / 2 for ms in first.heads[0].ms])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"fixed": 1}', '{"fixed": NaN, "heads": [], "neurons": [], "full": {}}', "null"]
)
def test_corrupted_cache_is_measured_again(sampler: FakeSampler, tmp_path: Path, content: str) -> None:
    model = tiny_model("bert")
    first = latency_table(model, 1, 7)
    (file,) = (p for p in tmp_path.rglob("*") if p.is_file())
    file.write_text(content)
    assert latency_table(model, 1, 7) == first
    assert len(sampler.names) == 2
    assert json.loads(file.read_text())["fixed"] == first.fixed
    assert [p.name for p in file.parent.iterdir()] == [file.name]


def test_falling_curve_in_the_cache_is_refused(sampler: FakeSampler, tmp_path: Path) -> None:
    model = tiny_model("bert")
    latency_table(model, 1, 7)
    (file,) = (p for p in tmp_path.rglob("*") if p.is_file())
    data = json.loads(file.read_text())
    data["heads"][0]["ms"].reverse()
    file.write_text(json.dumps(data))
    latency_table(model, 1, 7)
    assert len(sampler.names) == 2


def test_sliced_model_with_empty_blocks(sampler: FakeSampler) -> None:
    from secateur.edits import Slice, apply_edits

    model: nn.Module = tiny_model("bert")
    full = SubNetwork.full(model)
    sub = SubNetwork((full.heads[0], (False,) * 4, (True, False, True, True)), ((False,) * 48, *full.neurons[1:]))
    table = latency_table(apply_edits(model, [Slice(sub)]), 1, 7)
    assert isinstance(table, LatencyTable)
    assert table.heads[1] == Curve((0,), (0.0,))
    assert table.of(SubNetwork.full(model)) == pytest.approx(20.0)
