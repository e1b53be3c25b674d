"""Judging sub-networks of one super-network: here, or by workers of a Ray cluster that hold it once each."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import MissingExtra, SecateurError
from secateur.families import Sites, sites
from secateur.gates import can_stop, only, prefixes
from secateur.subnetwork import SubNetwork
from secateur.tasks import Task, evaluate_together
from secateur.tasks.batching import Batches

if TYPE_CHECKING:
    from transformers import PreTrainedModel

RETRIES = 3
"""How often a sub-network whose worker died is tried again."""
WAIT = 120
"""Seconds that workers may take to start."""


class Judge:
    """A super-network and the rows that its sub-networks are judged by.

    Args:
        model: the super-network.
        task: says which metric decides.
        rows: batches with labels.
        threads: of torch, where it judges; as they are if None.
    """

    def __init__(self, model: PreTrainedModel, task: Task, rows: Batches, threads: int | None = None) -> None:
        if threads is not None:
            torch.set_num_threads(threads)
        self.model, self.task, self.rows = model, task, rows
        self.sites = sites(model)

    def judged(self, sub: SubNetwork) -> list[SubNetwork]:
        """Those whose errors are found with a sub-network's: of its first layers, and itself, the last one."""
        return sub.prefixes() if can_stop(self.sites) else [sub]

    def errors(self, sub: SubNetwork) -> list[float]:
        """1 - metric of each of them, with the weights it inherits."""
        inside = prefixes if len(self.judged(sub)) > 1 else _alone
        with inside(self.sites, sub) as run:
            found = evaluate_together(self.model, self.task, self.rows, run)
        return [1 - each.metrics[self.task.metric] for each in found]


@contextmanager
def _alone(found: Sites, sub: SubNetwork) -> Iterator[Callable[[Callable[[], Tensor]], list[Tensor]]]:
    """A sub-network without those of its first layers."""
    with only(found, sub):
        yield lambda forward: [forward()]


class Workers:
    """Judges in processes of a Ray cluster, each of which is sent the super-network once.

    A judge whose process dies is started anew, and what it was asked is asked again. Without an address in RAY_ADDRESS
    a cluster is started on this machine, and ended with the workers.

    Args:
        judge: whose super-network and rows the workers get.
        count: how many there are; each takes one processor, and a GPU where the super-network is on one.

    Raises:
        SecateurError: Ray is not installed, or the cluster has not as many processors free.
    """

    def __init__(self, judge: Judge, count: int) -> None:
        try:
            self.ray: Any = import_module("ray")
        except ImportError:
            raise MissingExtra("Several workers need Ray: install secateur[ray], or set workers to 1.") from None
        ray = self.ray
        self.actors: list[Any] = []
        self.started = not ray.is_initialized()
        if self.started:
            ray.init(include_dashboard=False, log_to_driver=False, logging_level="error")
        gpus = int(judge.model.device.type == "cuda")
        has = ray.cluster_resources()
        for kind, each, what in (("CPU", 1, "processors"), ("GPU", gpus, "GPUs")):
            if has.get(kind, 0) < count * each:
                self.close()
                raise SecateurError(
                    f"{count} workers need as many {what}, and the cluster has {int(has.get(kind, 0))}: ask for fewer."
                )
        self.given = ray.put(  # held, since a worker that is started anew reads it again
            (judge.model, replace(judge.task, train=None, validation=None, test=None), judge.rows)
        )
        options = {"num_cpus": 1, "num_gpus": gpus, "max_restarts": -1, "max_task_retries": RETRIES}
        threads = max(1, torch.get_num_threads() // count)
        remote = ray.remote(**options)(_Remote)
        self.actors = [remote.remote(self.given, threads) for _ in range(count)]
        ready, _ = ray.wait([actor.process.remote() for actor in self.actors], num_returns=count, timeout=WAIT)
        if len(ready) < count:
            self.close()
            raise SecateurError(
                f"Only {len(ready)} of {count} workers found a free processor within {WAIT} s: ask for fewer, or wait "
                "until others are done."
            )

    def errors(self, subs: Mapping[int, SubNetwork]) -> Iterator[tuple[int, list[float], float]]:
        """The number of each sub-network, its errors and the seconds they took, in the order in which they are done.

        Raises:
            SecateurError: a sub-network could not be judged.
        """
        pool, lost = self.ray.util.ActorPool(self.actors), self.ray.exceptions
        for number, sub in subs.items():
            pool.submit(lambda actor, given: actor.judged.remote(*given), (number, sub.to_dict()))
        while pool.has_next():
            try:
                yield pool.get_next_unordered()
            except lost.RayTaskError as error:
                raise error.cause from None
            except lost.RayActorError:
                raise SecateurError(
                    f"Workers died {RETRIES + 1} times on one sub-network, perhaps for want of memory: ask for fewer."
                ) from None

    def processes(self) -> list[int]:
        """The process of each worker."""
        return list(self.ray.get([actor.process.remote() for actor in self.actors]))

    def close(self) -> None:
        """End the workers, and the cluster if it was started for them."""
        for actor in self.actors:
            self.ray.kill(actor)
        if self.started:
            self.ray.shutdown()


class _Remote:
    """A judge in a process of its own."""

    def __init__(self, given: tuple[PreTrainedModel, Task, Batches], threads: int) -> None:
        self.judge = Judge(*given, threads)

    def judged(self, number: int, sub: dict[str, Any]) -> tuple[int, list[float], float]:
        start = time.perf_counter()
        errors = self.judge.errors(SubNetwork.from_dict(sub))
        return number, errors, time.perf_counter() - start

    def process(self) -> int:
        return os.getpid()
