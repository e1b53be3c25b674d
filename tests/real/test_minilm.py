"""A real model on real data: quality that only holds if every part does its job."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoModelForSequenceClassification

import secateur
from secateur.families import sites

pytestmark = pytest.mark.real


@pytest.fixture(autouse=True)
def _data(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECATEUR_DATA", str(shared / "data"))


def test_optin_keeps_sentiment_at_half_of_the_macs(shared: Path, tmp_path: Path) -> None:
    """Dense 89.8 %; a mask search by chance gives about 78 % here, so 88 % needs scores, rearrangement and tuning."""
    result = secateur.compress(
        shared / "models" / "minilm-l6-sst2",
        secateur.Optin(batches=2, probes=8, tune_batches=6),
        task="glue/sst2",
        budget="macs<=50%",
        out=tmp_path / "out",
        seconds=1.0,
    )
    assert result.before.metrics["accuracy"] == pytest.approx(0.8979, abs=0.003)
    assert result.after.metrics["accuracy"] >= 0.88
    assert result.after.macs <= 0.5 * result.before.macs
    assert result.after.latency_ms["median"] < result.before.latency_ms["median"]
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert [s.units for s in sites(again)] == [s.units for s in sites(result.model)]
    assert again.config.id2label == result.model.config.id2label
    assert json.loads((tmp_path / "out" / "result.json").read_text())["task"]["examples"] == 872


@pytest.mark.slow
@pytest.mark.parametrize("method", ["optin", "ptf"])
def test_similarity_survives_at_60_percent(shared: Path, method: str) -> None:
    result = secateur.compress(
        shared / "models" / "minilm-l6-stsb", method, task="stsb", budget="macs<=60%", seconds=1.0
    )
    assert result.before.metrics["spearman"] == pytest.approx(0.8605, abs=0.003)
    assert result.after.metrics["spearman"] >= result.before.metrics["spearman"] - 0.02


@pytest.mark.slow
def test_demo_reaches_its_targets(tmp_path: Path) -> None:
    """Needs PyPI, or the demo's wheels in the cache."""
    from secateur.demo import run_demo

    record = run_demo(tmp_path / "demo")
    before, after = record["before"], record["after"]
    assert after["macs"] <= 0.6 * before["macs"]
    assert after["metrics"]["accuracy"] >= before["metrics"]["accuracy"] - 0.02
    assert after["latency_ms"]["median"] <= 0.75 * before["latency_ms"]["median"]
    assert {"dense", "compressed", "result.json", "report.html"} <= {p.name for p in (tmp_path / "demo").iterdir()}
