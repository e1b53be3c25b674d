"""The queue of a service and the thread that empties it, with an engine that waits for the test."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.serving.batching import Batcher, Example
from secateur.serving.controller import Controller, Row
from secateur.serving.metrics import Metrics
from secateur.serving.refusals import Refused

TIMEOUT = 60


class Held:
    """Computes when it is let, and remembers the batches: the logits of an example are its first id."""

    def __init__(self) -> None:
        self.go, self.begun = threading.Event(), threading.Semaphore(0)
        self.batches: list[list[int]] = []

    def __call__(self, examples: Sequence[Example], speedup: float) -> Sequence[Tensor]:
        self.batches.append([len(example.ids) for example in examples])
        self.begun.release()
        assert self.go.wait(TIMEOUT)
        if any(13 in example.ids for example in examples):
            raise RuntimeError("13 brings bad luck")
        return [torch.tensor([float(example.ids[0]), speedup]) for example in examples]


@pytest.fixture
def held() -> Iterator[Held]:
    made = Held()
    yield made
    made.go.set()


def batcher(run: Held, target: float | None = None, **given: Any) -> Batcher:
    settings: dict[str, Any] = {"batch_tokens": 8, "queue_tokens": 100, "most_wait": math.inf}
    return Batcher(run, Controller([Row(1, 1), Row(2, 2)], target), Metrics(), **settings | given)


def example(tokens: int, first: int = 5) -> Example:
    return Example([first, *[6] * (tokens - 1)])


def busy(made: Batcher, run: Held) -> Any:
    """A request of one token under way, so that what follows waits."""
    future = made.put([example(1)])
    assert run.begun.acquire(timeout=TIMEOUT)
    return future


def refused(made: Batcher, *examples: Example) -> tuple[int, str, int | None]:
    with pytest.raises(Refused) as error:
        made.put(examples)
    return error.value.status, str(error.value), error.value.retry


def test_batches_take_what_fits_in_order(held: Held) -> None:
    made = batcher(held)
    busy(made, held)
    futures = [made.put([example(n, first)]) for n, first in ((4, 7), (4, 8), (9, 9), (3, 10), (2, 11), (4, 12))]
    assert made.waiting == 26
    held.go.set()
    assert [float(f.result(TIMEOUT).logits[0][0]) for f in futures] == [7, 8, 9, 10, 11, 12]
    assert held.batches == [[1], [4, 4], [9], [3, 2], [4]]
    assert made.waiting == 0
    assert (made.accepted, made.answered) == (7, 7)


def test_a_request_of_several_batches(held: Held) -> None:
    made = batcher(held)
    held.go.set()
    answer = made.put([example(5, first) for first in range(20, 30)]).result(TIMEOUT)
    assert [int(row[0]) for row in answer.logits] == list(range(20, 30))
    assert answer.speedups == [1.0] * 10
    assert answer.queued >= 0
    assert held.batches == [[5]] * 10


def test_the_speedup_follows_what_waits(held: Held) -> None:
    """A second for each token: what waits needs more than 4 s at the first row."""
    made = batcher(held, target=4.0, clock=lambda: 0.0)
    made.controller.computed(10, 10.0)
    first = busy(made, held)
    second = made.put([example(5)])
    held.go.set()
    assert first.result(TIMEOUT).speedups == [1.0]
    assert second.result(TIMEOUT).speedups == [2.0]


def test_one_failure_leaves_the_others(held: Held) -> None:
    made = batcher(held, batch_tokens=100)
    busy(made, held)
    good, bad, also = made.put([example(2, 7)]), made.put([example(2, 8), example(2, 13)]), made.put([example(2, 9)])
    held.go.set()
    assert float(good.result(TIMEOUT).logits[0][0]) == 7
    assert float(also.result(TIMEOUT).logits[0][0]) == 9
    with pytest.raises(RuntimeError, match="bad luck"):
        bad.result(TIMEOUT)
    assert float(made.put([example(1, 4)]).result(TIMEOUT).logits[0][0]) == 4


def test_what_nobody_waits_for_is_not_computed(held: Held) -> None:
    made = batcher(held)
    first = busy(made, held)
    assert made.put([example(2), example(2)]).cancel()
    last = made.put([example(3)])
    assert not first.cancel()  # it is under way
    held.go.set()
    last.result(TIMEOUT)
    assert held.batches == [[1], [3]]


def test_a_full_queue_refuses(held: Held) -> None:
    """A second for each token, half of it at the fastest row."""
    made = batcher(held, clock=lambda: 0.0)
    made.controller.computed(10, 10.0)
    busy(made, held)
    waiting = made.put([example(90)])
    assert refused(made, example(21)) == (429, "The queue is full (90 tokens).", 6)  # 11 tokens in 5.5 s
    assert refused(made, example(101))[::2] == (413, None)
    fits = made.put([example(10)])
    held.go.set()
    assert waiting.result(TIMEOUT).logits
    assert fits.result(TIMEOUT).logits


def test_a_long_wait_refuses(held: Held) -> None:
    made = batcher(held, clock=lambda: 0.0, most_wait=5.0)
    made.controller.computed(10, 10.0)
    busy(made, held)
    made.put([example(9)])  # 10 tokens in 5 s: as long as allowed
    made.put([example(4)])
    assert refused(made, example(1)) == (429, "The queue would take 7 s.", 2)
    with pytest.raises(Refused):
        made.check()


def test_draining_finishes_what_was_taken(held: Held) -> None:
    made = batcher(held)
    futures = [busy(made, held), *(made.put([example(4)]) for _ in range(9))]
    made.drain()
    assert refused(made, example(1))[0] == 503
    assert not made.join(0)
    held.go.set()
    assert made.join(TIMEOUT)
    assert all(future.done() for future in futures)
    assert (made.accepted, made.answered) == (10, 10)


def test_lingering(held: Held) -> None:
    """A batch waits for more until it is full, or nothing more will come."""
    made = batcher(held, linger=3600.0)
    held.go.set()
    first = made.put([example(4)])
    assert not held.begun.acquire(timeout=0.05)
    second = made.put([example(4)])
    assert first.result(TIMEOUT).logits
    assert second.result(TIMEOUT).logits
    assert held.batches == [[4, 4]]
    third = made.put([example(2)])
    made.drain()
    assert third.result(TIMEOUT).logits
    assert made.join(TIMEOUT)


def test_nobody_waits_for_a_worker_that_is_gone(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda given: None)  # it is meant to fail
    made = batcher(held)
    first = busy(made, held)
    second = made.put([example(3)])
    made.metrics.batch = None  # type: ignore[assignment, method-assign]
    held.go.set()
    for future in (first, second):
        with pytest.raises(TypeError):
            future.result(TIMEOUT)
    assert made.join(TIMEOUT)
    with pytest.raises(Refused, match="about to end"):
        made.put([example(1)])


def test_an_engine_that_leaves_examples_out_is_an_error(held: Held) -> None:
    held.go.set()
    made = batcher(held)
    made.run = lambda examples, speedup: held(examples, speedup)[:-1]
    with pytest.raises(SecateurError, match="answered 0 of 1 examples"):
        made.put([example(2)]).result(TIMEOUT)
