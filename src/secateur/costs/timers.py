"""Honest timers of a model on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from secateur.costs.analytic import evaluation
from secateur.costs.inputs import dummy_inputs, run
from secateur.costs.neighbours import watched
from secateur.errors import InvalidData

WARMUP_RUNS = 3
"""Runs of each model that are thrown away: first calls pick kernels and fill caches."""

PATIENCE = 20
"""Hundredths of a second to wait at most for threads to go to sleep."""


@dataclass(frozen=True)
class Timing:
    """How long one forward pass takes.

    Attributes:
        median: milliseconds.
        p90: milliseconds, the 90th percentile by nearest rank.
        n: passes measured.
        threads: torch threads.
        dtype: of the parameters.
        batch: examples per pass.
        tokens: tokens per example (image models: as asked for, not used).
    """

    median: float
    p90: float
    n: int
    threads: int
    dtype: str
    batch: int
    tokens: int

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def time_model(
    model: nn.Module, batch: int = 1, tokens: int = 128, *, seconds: float = 2.0, min_runs: int = 10
) -> Timing:
    """Time forward passes of one model on random inputs without padding.

    Args:
        model: a transformers model; its train/eval mode is put back afterwards.
        batch: examples per pass.
        tokens: tokens per example.
        seconds: how long to measure, warm-up not included.
        min_runs: passes to measure even if that takes longer.
    """
    return time_interleaved({"model": model}, batch, tokens, seconds=seconds, min_runs=min_runs)["model"]


def time_interleaved(
    models: Mapping[str, nn.Module], batch: int = 1, tokens: int = 128, *, seconds: float = 4.0, min_runs: int = 10
) -> dict[str, Timing]:
    """Time several models in turns, so that a busy moment of the machine meets all of them and ratios are fair.

    Args:
        models: models by name.
        batch: examples per pass.
        tokens: tokens per example.
        seconds: how long to measure all of them together, warm-up not included.
        min_runs: passes of each model to measure even if that takes longer.
    """
    with ExitStack() as stack:
        for model in models.values():
            stack.enter_context(evaluation(model))
        stack.enter_context(torch.inference_mode())
        samples = sample({name: pass_of(m, batch, tokens) for name, m in models.items()}, seconds, min_runs)
    return {name: summarise(samples[name], model, batch, tokens) for name, model in models.items()}


def pass_of(model: nn.Module, batch: int, tokens: int) -> Callable[[], object]:
    """A function that runs one forward pass, and waits for it if the model is on a GPU."""
    inputs = dummy_inputs(model, batch, tokens)
    if next(model.parameters()).device.type != "cuda":
        return lambda: run(model, inputs)

    def synchronous() -> None:
        run(model, inputs)
        torch.cuda.synchronize()

    return synchronous


def sample(
    runners: Mapping[str, Callable[[], object]],
    seconds: float,
    min_runs: int,
    clock: Callable[[], float] = time.perf_counter,
    *,
    own_threads: bool = False,
) -> dict[str, list[float]]:
    """Durations of each runner in milliseconds, measured round by round; every round starts with another runner.

    Args:
        runners: functions to time.
        seconds: stop after the first round that ends later than this.
        min_runs: rounds to do in any case.
        clock: current time in seconds.
        own_threads: whether each runner has a pool of threads: it then waits until those of the one before are asleep,
            and has a pass that does not count, to wake its own.

    Raises:
        InvalidData: nothing to time.
    """
    if not runners or min_runs < 1:
        raise InvalidData("Timing needs at least one model and min_runs of at least 1.")
    for runner in runners.values():
        for _ in range(WARMUP_RUNS):
            runner()
    names = list(runners)
    durations: dict[str, list[float]] = {name: [] for name in names}
    begin, rounds = clock(), 0
    with watched():
        while rounds < min_runs or clock() - begin < seconds:
            shift = rounds % len(names)
            for name in names[shift:] + names[:shift]:
                if own_threads:
                    wait_for_sleep()
                    runners[name]()
                start = clock()
                runners[name]()
                durations[name].append(1000 * (clock() - start))
            rounds += 1
    return durations


def wait_for_sleep(spent: Callable[[], float] = time.process_time, sleep: Callable[[float], None] = time.sleep) -> None:
    """Wait until no thread of this process computes: pools look out for work for a while, on cores that others need.

    After a pass in two threads torch does so for about 5 ms and ONNX Runtime for 25; a pass of another engine in two
    threads, begun at once, took 1.8 times as long.

    Args:
        spent: seconds for which this process has computed.
        sleep: waits for so many seconds.
    """
    for _ in range(PATIENCE):
        before = spent()
        sleep(0.01)  # kernels may count the time of other threads by ticks of 4 ms
        if spent() - before < 0.001:
            return


def summarise(durations: list[float], model: nn.Module, batch: int, tokens: int) -> Timing:
    """Median and 90th percentile (nearest rank) of durations in milliseconds."""
    ranked = sorted(durations)
    p90 = ranked[-(-9 * len(ranked) // 10) - 1]
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    return Timing(statistics.median(ranked), p90, len(ranked), torch.get_num_threads(), dtype, batch, tokens)
