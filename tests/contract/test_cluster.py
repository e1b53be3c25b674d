"""Judging on a Ray cluster of this machine: the same errors as here, also when a worker is killed on the way."""

from __future__ import annotations

import os
import random
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import secateur
from secateur.cluster import Judge, Workers
from secateur.errors import SecateurError
from secateur.families import sites
from secateur.methods.nas import Nas
from secateur.optimize.spaces import Space
from secateur.run import Run
from secateur.tasks import batches
from tests.conftest import tiny_model
from tests.contract.test_methods import tiny_task, tiny_tokenizer
from tests.contract.test_nas import NAS


@pytest.fixture(scope="module")
def judge() -> Judge:
    task = tiny_task(100)
    return Judge(tiny_model("bert"), task, batches(task, "train", tiny_tokenizer()))


@pytest.fixture(scope="module")
def workers(judge: Judge) -> Iterator[Workers]:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="error")
    found = Workers(judge, 2)
    yield found
    found.close()
    assert ray.is_initialized()  # the cluster was not the workers' to end
    ray.shutdown()


def test_a_killed_worker_costs_no_result(judge: Judge, workers: Workers) -> None:
    space, source = Space.of("medium", sites(judge.model)), random.Random(0)
    subs = {number: space.decode(space.sample(source)) for number in range(40)}
    wanted = {number: judge.errors(sub) for number, sub in subs.items()}
    first, second = before = workers.processes()
    assert len({first, second, os.getpid()}) == 3
    found: dict[int, list[float]] = {}
    for number, errors, seconds in workers.errors(subs):
        assert seconds > 0
        if len(found) == 3:
            os.kill(first, signal.SIGKILL)
        found[number] = errors
    assert found.keys() == wanted.keys()
    assert all(found[number] == pytest.approx(wanted[number], abs=1e-6) for number in found)
    assert set(workers.processes()) - set(before)  # another process has taken its place


def test_a_search_by_two_workers(workers: Workers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two at a time give a front, every error is that of a search here, and a resumed search asks for none again."""
    given: dict[str, Any] = {
        "task": tiny_task(),
        "tokenizer": tiny_tokenizer(),
        "out": tmp_path / "front",
        "seconds": 0.02,
    }
    method = Nas(**NAS | {"workers": 2, "evaluations": 14, "sampler": "local"})
    asked: list[str] = []
    usual = Workers.errors

    def counted(self: Workers, subs: dict[int, Any]) -> Any:
        if len(asked) >= 6 and not (tmp_path / "again").exists():
            raise KeyboardInterrupt
        asked.extend(sub.digest for sub in subs.values())
        return usual(self, subs)

    monkeypatch.setattr(Workers, "errors", counted)
    with pytest.raises(KeyboardInterrupt):
        secateur.search(tiny_model("bert"), method, **given)
    (tmp_path / "again").touch()
    front = secateur.search(tiny_model("bert"), method, **given, resume=True)
    assert [point.number for point in front.points] == list(range(len(front.points)))
    assert len(set(asked)) == len(asked) <= 14 < len(front.points)  # each once, and those of their first layers
    held = secateur.methods.nas.held_out(given["task"], 0.2, 2048, 0)  # type: ignore[attr-defined]
    here = Judge(front.model, held, batches(held, "validation", given["tokenizer"]))
    assert [point.error for point in front.points] == pytest.approx(
        [here.errors(p.sub)[-1] for p in front.points], abs=1e-6
    )
    assert front.seconds["search"] > 0


def test_what_cannot_be_had(judge: Judge, workers: Workers, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SecateurError, match=r"1000 workers need as many processors, and the cluster has \d+"):
        Workers(judge, 1000)
    assert workers.processes()
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(SecateurError, match=r"install secateur\[ray\]"):
        Workers(judge, 2)
    with pytest.raises(SecateurError, match="workers is a whole number from 1"):
        Nas(workers=0)


def test_a_run_says_what_it_has(tmp_path: Path) -> None:
    run = Run(tmp_path / "run", {})
    run.record("candidate 1", lambda: 0.5, part_of="search")
    assert run.has("candidate 1")
    assert not run.has("candidate 2")
    assert not Run(None, {}).has("candidate 1")
    assert list(run.seconds) == ["search"]
