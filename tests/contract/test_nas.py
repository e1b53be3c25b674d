"""Contract of NAS: families and spaces end in a cut that meets the budget, a killed run loses nothing, bad input."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

import secateur
from secateur.errors import InvalidBudget, InvalidData, SecateurError, UnsupportedModel
from secateur.families import sites
from secateur.gates import only
from secateur.methods.nas import Nas
from tests.conftest import ENCODERS, tiny_batch, tiny_model
from tests.contract.test_families import logits
from tests.contract.test_methods import compress, tiny_task, tiny_tokenizer

NAS: dict[str, Any] = dict(epochs=1, lr=1e-3, batch_size=8, evaluations=20, batches=1, multiple=8)


@pytest.mark.parametrize("family", ENCODERS)
def test_every_encoder_is_searched(family: str, tmp_path: Path) -> None:
    model = tiny_model(family)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = compress(
        model,  # type: ignore[arg-type]
        Nas(**NAS),
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget="encoder_params<=60%",
        out=tmp_path / "out",
    )
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    (term,) = result.budget["terms"]
    assert term["met"]
    assert result.after.encoder_params == term["reached"] <= 0.6 * result.before.encoder_params
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again, tiny_batch(family)), logits(result.model, tiny_batch(family)))
    assert result.after.bytes == (tmp_path / "out" / "model.safetensors").stat().st_size


@pytest.mark.parametrize(
    "settings",
    [
        {"space": "medium"},
        {"space": "layer", "sampler": "random"},
        {"space": "large", "sampler": "evolution", "evaluations": 30},
        {"space": "small", "sampler": "nsga2", "order": False},
        {"strategy": "distilled", "sampler": "tpe", "stratified": False},
        {"strategy": "standard", "holdout": 0.0, "subnetworks": 1},
    ],
)
def test_spaces_strategies_and_samplers(settings: dict[str, Any]) -> None:
    result = compress(
        tiny_model("bert"),  # type: ignore[arg-type]
        Nas(**NAS | settings),
        task=tiny_task(),
        tokenizer=tiny_tokenizer(),
        budget="macs<=70%,params<=90%",
    )
    assert all(term["met"] for term in result.budget["terms"])
    widths = [(site.kind, site.units) for site in sites(result.model)]
    if settings.get("space") == "layer":
        assert all(units in (0, 4 if kind == "heads" else 48) for kind, units in widths)
    if settings.get("space", "small") == "small":  # the first layers are alike, the others gone
        each = [units for kind, units in widths if kind == "heads"]
        assert set(each) <= {0, each[0]}
        assert each == sorted(each, reverse=True)
    kinds = [edit["type"] for edit in result.edits]
    assert kinds == (["slice", "bypass"] if any(units == 0 for _, units in widths) else ["slice"])
    if settings.get("order") is False:
        assert result.scores == {}
    else:
        assert all(
            values == sorted(values, reverse=True) for values in [*result.scores["heads"], *result.scores["neurons"]]
        )
        assert [len(values) for values in result.scores["neurons"]] == [48] * 3


def test_a_super_network_is_searched_as_it_is() -> None:
    """Every depth of a candidate is a point, with the error that its sub-network has by itself."""
    model: Any = tiny_model("bert")
    method = Nas(**NAS | {"strategy": None, "order": False, "evaluations": 2, "holdout": 0.0})
    assert method.check(model, [], 100) == {"steps": 0, "evaluations": 2}
    task, words = tiny_task(), tiny_tokenizer()
    front = secateur.search(model, method, task=task, tokenizer=words)
    assert all(torch.equal(value, front.model.state_dict()[name]) for name, value in model.state_dict().items())
    kept = [sum(width > 0 for width in point.sub.head_widths) for point in front.points]
    assert kept == [3, 2, 1, 0]  # of the full network and of the lower bounds
    assert front.points[0].seconds == front.points[2].seconds < front.points[3].seconds
    rows = secateur.methods.nas.batches(task, "validation", words)  # type: ignore[attr-defined]
    for point in front.points:
        with only(model, point.sub):
            alone = secateur.tasks.evaluate_batches(model, task, rows)
        assert point.error == pytest.approx(1 - alone.metrics["accuracy"], abs=1e-9)


ALONE: dict[str, Any] = NAS | {"strategy": "alone", "epochs": 3, "evaluations": 7, "sampler": "random"}


def test_candidates_are_trained_alone(tmp_path: Path) -> None:
    """One of three goes on to three epochs; a point of the front is cut out with weights of its own."""
    model: Any = tiny_model("bert")
    task, words = tiny_task(200), tiny_tokenizer()
    given: dict[str, Any] = {"task": task, "tokenizer": words, "seconds": 0.02}
    front = secateur.search(model, Nas(**ALONE), **given, out=tmp_path / "front")
    assert [point.number for point in front.points] == list(range(len(front.points)))
    assert 5 <= len(front.points) <= 7  # some mean the same network
    assert torch.allclose(logits(front.model, tiny_batch("bert")), logits(model, tiny_batch("bert")), atol=1e-5)
    loaded = secateur.Front.load(tmp_path / "front")
    assert sorted(loaded.weights) == sorted(point.number for point in front.pareto())
    held = secateur.methods.nas.held_out(task, 0.2, 2048, 0)  # type: ignore[attr-defined]
    for point in front.pareto():
        small = loaded.extract(point, tmp_path / str(point.number))
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / str(point.number))
        assert torch.equal(logits(again, tiny_batch("bert")), logits(small, tiny_batch("bert")))
        found = secateur.tasks.evaluate(again, words, held)
        assert point.error == pytest.approx(1 - found.metrics["accuracy"], abs=1e-9)
    off = next(point for point in front.points if point not in front.pareto())
    with pytest.raises(SecateurError, match="only weights of the front were kept"):
        loaded.extract(off)
    (tmp_path / "front" / "points" / f"{front.pareto()[0].number}.safetensors").unlink()
    with pytest.raises(SecateurError, match="is damaged"):
        secateur.Front.load(tmp_path / "front")
    result = secateur.compress(model, Nas(**ALONE), **given, budget="params<=90%")
    assert result.budget["terms"][0]["met"]


def test_a_candidate_that_comes_again_is_not_ranked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Proposed once more after it went on: its error of more epochs is not told as that of one."""
    told: list[tuple[int, int]] = []
    usual = secateur.methods.nas.Halving.tell  # type: ignore[attr-defined]

    def noted(self: Any, number: int, rung: int, *given: Any) -> None:
        told.append((number, rung))
        usual(self, number, rung, *given)

    monkeypatch.setattr("secateur.methods.nas.Halving.tell", noted)
    method = Nas(**ALONE | {"space": "layer", "evaluations": 14, "epochs": 2})
    secateur.search(tiny_model("bert"), method, task=tiny_task(), tokenizer=tiny_tokenizer())  # type: ignore[arg-type]
    assert len(set(told)) == len(told)
    assert len([rung for _, rung in told if rung == 0]) <= 8 < 14  # there are 2 x 2 x 2 sub-networks
    assert any(rung == 1 for _, rung in told)


def test_training_alone_goes_on_after_a_stop(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped between the second and the third epoch of the one that went on: the same errors and weights."""
    given: dict[str, Any] = {"task": tiny_task(200), "tokenizer": tiny_tokenizer(), "seconds": 0.02}
    usual = secateur.alone.KeepBest.on_epoch_end  # type: ignore[attr-defined]
    epochs: list[int] = []
    stop_at = [0]

    def counted(self: Any, args: Any, state: Any, *more: Any, **rest: Any) -> None:
        usual(self, args, state, *more, **rest)
        epochs.append(round(state.epoch))
        if epochs[-1] == stop_at[-1]:
            raise KeyboardInterrupt

    def run(**more: Any) -> Any:
        epochs.clear()
        return secateur.search(tiny_model("bert"), Nas(**ALONE), **given, **more)  # type: ignore[arg-type]

    monkeypatch.setattr("secateur.alone.KeepBest.on_epoch_end", counted)
    monkeypatch.setattr("secateur.train.loop.CHECKPOINT_SECONDS", 0)
    whole, needed = run(), len(epochs)
    stop_at.append(2)
    with pytest.raises(KeyboardInterrupt):
        run(out=tmp_path / "front")
    stop_at.append(0)
    done = len(epochs)
    resumed = run(out=tmp_path / "front", resume=True)
    assert done >= 4
    assert len(epochs) <= needed - done + 1
    assert [(p.sub, p.error) for p in resumed.points] == [(p.sub, p.error) for p in whole.points]
    assert resumed.weights.keys() == whole.weights.keys()
    for number, weights in resumed.weights.items():
        assert all(torch.equal(weights[name], whole.weights[number][name]) for name in weights)


def test_candidates_are_judged_by_rows_held_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 64 training rows 16 are held out; validation rows are seen before and after, but by no candidate."""
    seen: list[int] = []
    usual = secateur.cluster.evaluate_together  # type: ignore[attr-defined]

    def look(model: Any, task: Any, rows: Any, run: Any) -> Any:
        seen.append(sum(len(batch["labels"]) for batch in rows))
        return usual(model, task, rows, run)

    monkeypatch.setattr("secateur.cluster.evaluate_together", look)
    task, rows = tiny_task(), len(tiny_task().train)  # type: ignore[arg-type]
    compress(
        tiny_model("bert"),  # type: ignore[arg-type]
        Nas(**NAS | {"holdout": 0.25}),
        task=task,
        tokenizer=tiny_tokenizer(),
        budget="macs<=70%",
    )
    assert 3 < len(seen) <= 20
    assert set(seen) == {round(0.25 * rows)}


def _compress(model: Path, out: Path, *, resume: bool = False) -> subprocess.Popen[bytes]:
    code = f"""
import torch; torch.set_num_threads(1)
import secateur, secateur.train.loop
secateur.train.loop.CHECKPOINT_SECONDS = 0
from tests.contract.test_methods import tiny_task
from tests.contract.test_nas import NAS
method = secateur.Nas(**{{**NAS, "epochs": 2, "evaluations": 60}})
secateur.compress({str(model)!r}, method, task=tiny_task(100), budget="macs<=60%", out={str(out)!r}, resume={resume},
                  seconds=0.05)
"""
    return subprocess.Popen(
        [sys.executable, "-c", code], stderr=subprocess.PIPE, env={**os.environ, "HF_HUB_OFFLINE": "1"}
    )


def test_a_killed_run_resumes_to_the_same_model(tmp_path: Path) -> None:
    """SIGKILL in the training, then in the search."""
    tiny_model("bert").save_pretrained(tmp_path / "dense")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    assert _compress(tmp_path / "dense", tmp_path / "whole").wait(300) == 0
    stages = tmp_path / "out.run"
    for marker, count in (("training/checkpoint-*/complete", 1), ("candidate *.json", 7)):
        run = _compress(tmp_path / "dense", tmp_path / "out", resume=stages.exists())
        deadline = time.monotonic() + 300
        while len(list(stages.glob(marker))) < count and run.poll() is None and time.monotonic() < deadline:
            time.sleep(0.002)
        assert run.poll() is None
        run.send_signal(signal.SIGKILL)
        run.wait()
    last = _compress(tmp_path / "dense", tmp_path / "out", resume=True)
    assert last.wait(300) == 0, last.stderr.read()  # type: ignore[union-attr]
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "out"))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_what_was_evaluated_is_not_evaluated_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    usual, calls, stops = secateur.cluster.evaluate_together, [], [5]  # type: ignore[attr-defined]

    def counted(*given: Any) -> Any:
        if len(calls) == stops[-1]:
            raise KeyboardInterrupt
        calls.append(1)
        return usual(*given)

    def run(out: str, *, resume: bool = False) -> Any:
        task, words = tiny_task(), tiny_tokenizer()
        return compress(tiny_model("bert"), Nas(**NAS), task=task, tokenizer=words, out=tmp_path / out, resume=resume)  # type: ignore[arg-type]

    monkeypatch.setattr("secateur.cluster.evaluate_together", counted)
    with pytest.raises(KeyboardInterrupt):
        run("out")
    stops.append(-1)
    resumed, both = run("out", resume=True), len(calls)
    whole = run("whole")
    assert both == len(calls) - both > 5
    assert resumed.subnetwork == whole.subnetwork


@pytest.mark.parametrize(
    ("settings", "budget", "message"),
    [
        ({"space": "huge"}, None, "space is small or medium or layer or large"),
        ({"strategy": "x"}, None, "strategy is standard or random or linear or sandwich"),
        ({"sampler": "grid"}, None, "sampler is random or local or evolution or nsga2"),
        ({"holdout": 1}, None, "holdout is a share, from 0 to below 1"),
        ({"temperature": 0}, None, "temperature is above 0"),
        ({"strategy": "alone", "workers": 2}, None, "leave workers at 1"),
        ({"evaluations": 0}, None, "evaluations is a whole number from 1"),
        ({"space": "large", "sampler": "gp"}, None, "many variables|models each of the"),
        ({}, "sparsity>=50%", "nas takes no 'sparsity' budget"),
        ({"evaluations": 1}, "macs<=20%", "None of 3 sub-networks meets the budget .* raise evaluations"),
        ({}, "params<=1%", "nearest feasible budget"),
    ],
)
def test_bad_settings_and_budgets(settings: dict[str, Any], budget: str | None, message: str) -> None:
    kind: Any = InvalidBudget if budget else SecateurError
    with pytest.raises(kind, match=message):
        compress(
            tiny_model("bert", **({"num_hidden_layers": 30} if settings.get("sampler") == "gp" else {})),  # type: ignore[arg-type]
            Nas(**NAS | settings),
            task=tiny_task(),
            tokenizer=tiny_tokenizer(),
            budget=budget,
        )


def test_what_cannot_be_searched_is_refused_before_training() -> None:
    with pytest.raises(UnsupportedModel, match="several stacks"):
        secateur.Nas().check(tiny_model("bart"), [], 100)  # type: ignore[arg-type]
    task = tiny_task()
    with pytest.raises(InvalidData, match="no 'train' split|no training rows"):
        compress(
            tiny_model("bert"),  # type: ignore[arg-type]
            Nas(**NAS),
            task=type(task)(**{**task.__dict__, "train": None}),
            tokenizer=tiny_tokenizer(),
        )
