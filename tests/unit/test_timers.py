from __future__ import annotations

from collections.abc import Callable

import pytest

from secateur.costs import timers
from secateur.costs.timers import PATIENCE, WARMUP_RUNS, sample, summarise, time_interleaved, time_model, wait_for_sleep
from secateur.errors import InvalidData
from tests.conftest import tiny_model


class Clock:
    """A clock that only the timed functions move."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []

    def __call__(self) -> float:
        return self.now

    def runner(self, name: str, seconds: float) -> Callable[[], None]:
        def run() -> None:
            self.calls.append(name)
            self.now += seconds

        return run


def test_rounds_rotate_and_warm_up_is_discarded() -> None:
    clock = Clock()
    runners = {name: clock.runner(name, s) for name, s in (("a", 0.001), ("b", 0.002), ("c", 0.003))}
    samples = sample(runners, seconds=0.0, min_runs=4, clock=clock)
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}
    assert samples["b"] == pytest.approx([2.0] * 4)
    assert clock.calls[: 3 * WARMUP_RUNS] == ["a"] * WARMUP_RUNS + ["b"] * WARMUP_RUNS + ["c"] * WARMUP_RUNS
    assert "".join(clock.calls[3 * WARMUP_RUNS :]) == "abcbcacababc"


def test_measures_until_time_is_up() -> None:
    clock = Clock()
    samples = sample({"a": clock.runner("a", 0.25)}, seconds=1.0, min_runs=2, clock=clock)
    assert len(samples["a"]) == 4


@pytest.mark.parametrize(("milliseconds", "sleeps"), [(0, 1), (25, 4), (10_000, PATIENCE)])
def test_waits_for_threads_that_look_out_for_work(milliseconds: int, sleeps: int) -> None:
    now, spent, slept = 0.0, 0.0, 0

    def sleep(seconds: float) -> None:
        nonlocal now, spent, slept
        spent += max(0.0, min(seconds, milliseconds / 1000 - now))
        now += seconds
        slept += 1

    wait_for_sleep(lambda: spent, sleep)
    assert slept == sleeps


def test_runners_with_threads_of_their_own_do_not_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(timers, "wait_for_sleep", clock.runner("wait ", 0.5))
    samples = sample({name: clock.runner(name, 0.001) for name in "ab"}, 0.0, 2, clock, own_threads=True)
    assert samples == {"a": pytest.approx([1.0] * 2), "b": pytest.approx([1.0] * 2)}
    assert "".join(clock.calls[2 * WARMUP_RUNS :]) == "wait aawait bbwait bbwait aa"


def test_nothing_to_time() -> None:
    with pytest.raises(InvalidData, match="at least one model"):
        sample({}, 1.0, 1)


def test_summary_by_hand() -> None:
    timing = summarise([float(v) for v in (5, 1, 4, 2, 3, 6, 10, 8, 7, 9)], tiny_model("bert").bfloat16(), 2, 7)
    assert (timing.median, timing.p90, timing.n) == (5.5, 9.0, 10)
    assert (timing.dtype, timing.batch, timing.tokens) == ("bfloat16", 2, 7)
    assert summarise([3.0], tiny_model("bert"), 1, 1).p90 == 3.0
    assert timing.to_dict()["median"] == 5.5


def test_models_keep_their_mode() -> None:
    train, evaluated = tiny_model("bert").train(), tiny_model("bert")
    timings = time_interleaved({"a": train, "b": evaluated}, 1, 5, seconds=0.0, min_runs=2)
    assert {name: t.n for name, t in timings.items()} == {"a": 2, "b": 2}
    assert train.training
    assert not evaluated.training
    assert time_model(train, 1, 5, seconds=0.0, min_runs=3).n == 3
    assert train.training
