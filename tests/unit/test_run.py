from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from secateur import prune
from secateur.costs.budget import Constraint
from secateur.errors import SecateurError
from secateur.prune import pack_units, tune_mode, unpack_units
from secateur.run import Run
from secateur.subnetwork import SubNetwork, UnitScores


def test_finished_stages_are_read_back_bit_by_bit(tmp_path: Path) -> None:
    calls: list[str] = []

    def tensors() -> dict[str, torch.Tensor]:
        calls.append("tensors")
        return {"a": torch.randn(5, generator=torch.Generator().manual_seed(len(calls))), "empty": torch.zeros(3, 0)}

    def record() -> dict[str, float]:
        calls.append("record")
        return {"x": 0.1 + 0.2}

    first = Run(tmp_path / "run", {"seed": 0})
    a, b = first.tensors("score", tensors), first.record("search", record)
    again = Run(tmp_path / "run", {"seed": 0}, resume=True)
    c, d = again.tensors("score", tensors), again.record("search", record)
    assert calls == ["tensors", "record"]
    assert torch.equal(a["a"], c["a"])
    assert c["empty"].shape == (3, 0)
    assert b == d == {"x": 0.30000000000000004}
    assert again.seconds == first.seconds


def test_a_damaged_stage_is_computed_again(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    run.tensors("score", lambda: {"a": torch.ones(2)})
    (tmp_path / "run" / "score.safetensors").write_bytes(b"cut off")
    again = Run(tmp_path / "run", {}, resume=True).tensors("score", lambda: {"a": torch.zeros(2)})
    assert again["a"].tolist() == [0, 0]


def test_without_resume_the_stages_are_forgotten(tmp_path: Path) -> None:
    Run(tmp_path / "run", {}).record("search", lambda: 1)
    assert Run(tmp_path / "run", {}).record("search", lambda: 2) == 2


def test_a_run_without_folder_keeps_nothing() -> None:
    run = Run(None, {})
    assert run.record("search", lambda: 1) == 1
    assert run.record("search", lambda: 2) == 2
    assert set(run.seconds) == {"search"}


def test_units_are_packed_by_block() -> None:
    heads, neurons = [torch.ones(2), torch.zeros(3)], [torch.arange(4.0)]
    packed = pack_units("score", heads, neurons)
    assert set(packed) == {"score.heads.0", "score.heads.1", "score.neurons.0"}
    again = unpack_units("score", packed)
    assert [t.tolist() for t in again[0]] == [[1, 1], [0, 0, 0]]
    assert again[1][0].tolist() == [0, 1, 2, 3]


def test_modes_of_tuning() -> None:
    assert tune_mode(True, "full") == "full"
    assert tune_mode(True, "scale") == "scale"
    assert tune_mode(False, "full") == "none"
    assert tune_mode("scale", "full") == "scale"
    with pytest.raises(SecateurError, match="none, scale, full"):
        tune_mode("ridge", "full")  # type: ignore[arg-type]


@pytest.mark.parametrize(("misses", "chosen", "limits"), [((1.3, 1.1, 1.2, 1.4), 1, 5), ((1.25, 0.9), 1, 2)])
def test_latency_search_tightens_and_keeps_the_fastest_cut(
    misses: tuple[float, ...], chosen: int, limits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuts = [SubNetwork(((True,) * width,), ()) for width in range(1, 7)]
    asked: list[float] = []

    def allocate(scores: object, constraints: list[Constraint], **settings: object) -> SubNetwork:
        asked.append(constraints[0].limit)
        return cuts[len(asked) - 1]

    clock = dict(zip(cuts, misses, strict=False))
    monkeypatch.setattr(prune, "allocate", allocate)
    monkeypatch.setattr(prune, "_miss", lambda job, sub: clock[sub])
    job: Any = SimpleNamespace(constraints=[Constraint("latency", 10.0, None)])  # type: ignore[arg-type]
    found = prune.search(job, UnitScores([], []), multiple=1, head_rate=1.0)
    assert found == cuts[chosen]
    assert len(asked) == limits
    assert asked[1] == pytest.approx(10.0 / misses[0] * 0.98)
