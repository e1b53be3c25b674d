"""A queue of examples, and the one thread that takes batches from it."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from secateur.errors import SecateurError
from secateur.serving.controller import Controller
from secateur.serving.metrics import Metrics
from secateur.serving.refusals import Refused


class Example(NamedTuple):
    """Token ids of an example, and their types if the model has some."""

    ids: list[int]
    types: list[int] | None = None


@dataclass(frozen=True)
class Answer:
    """What a request gets.

    Attributes:
        logits: of each example.
        speedups: that each example was computed at.
        queued: seconds before its first batch began.
        computed: seconds from then until its last batch was done.
    """

    logits: list[Tensor]
    speedups: list[float]
    queued: float
    computed: float


@dataclass(eq=False)
class _Request:
    """A request on its way: what it gets, place by place, and how many examples are still to come."""

    arrived: float
    left: int
    future: Future[Answer] = field(default_factory=Future)
    begun: float = 0.0
    logits: dict[int, Tensor] = field(default_factory=dict)
    speedups: dict[int, float] = field(default_factory=dict)

    def wanted(self, now: float) -> bool:
        """Whether anyone still waits for it; from now on it cannot be cancelled."""
        if not self.future.running() and not self.future.done() and self.future.set_running_or_notify_cancel():
            self.begun = now
        return self.future.running()


class _Place(NamedTuple):
    """An example of a request."""

    request: _Request
    number: int
    example: Example


class Batcher:
    """Computes examples in the order in which they came, as many at a time as a limit of tokens allows.

    Args:
        run: logits of each example, at a speed-up; called by one thread.
        controller: chooses the speed-up.
        metrics: that batches and answers are counted in.
        batch_tokens: of a batch, unless one example alone has more.
        queue_tokens: that may wait.
        most_wait: seconds; requests that would wait longer, at the fastest speed-up, are refused.
        linger: seconds that a batch that is not full waits for more.
        clock: seconds.
    """

    def __init__(
        self,
        run: Callable[[Sequence[Example], float], Sequence[Tensor]],
        controller: Controller,
        metrics: Metrics,
        *,
        batch_tokens: int,
        queue_tokens: int,
        most_wait: float,
        linger: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.run, self.controller, self.metrics, self.clock = run, controller, metrics, clock
        self.batch_tokens, self.queue_tokens = batch_tokens, queue_tokens
        self.most_wait, self.linger = most_wait, linger
        self.accepted = self.answered = 0
        self.draining = False
        self.waiting = 0  # tokens in the queue
        self._computing = 0  # tokens of the batch under way
        self._batch: list[_Place] = []  # under way
        self._queue: deque[_Place] = deque()
        self._changed = threading.Condition()
        self._worker = threading.Thread(target=self._work, name="secateur", daemon=True)
        self._worker.start()

    def check(self, tokens: int = 0) -> None:
        """Refuse what cannot be taken now.

        Raises:
            Refused: too many tokens for the queue at any time; too many for now; or none are taken any more.
        """
        if self.draining:
            raise Refused(503, "This server is about to end: ask another one.")
        if tokens > self.queue_tokens:
            raise Refused(413, f"{tokens} tokens are too many for one request: {self.queue_tokens} may wait at most.")
        wait = self.controller.wait(self.waiting + self._computing)
        over = self.waiting + tokens - self.queue_tokens
        if over > 0:
            raise Refused(429, f"The queue is full ({self.waiting} tokens).", self.controller.wait(over))
        if wait > self.most_wait:
            raise Refused(429, f"The queue would take {wait:.2g} s.", wait - self.most_wait)

    def put(self, examples: Sequence[Example]) -> Future[Answer]:
        """Take a request, whose examples are valid.

        Raises:
            Refused: see `check`.
        """
        tokens = sum(len(example.ids) for example in examples)
        with self._changed:
            self.check(tokens)
            now = self.clock()
            request = _Request(now, len(examples))
            self._queue.extend(_Place(request, number, example) for number, example in enumerate(examples))
            self.waiting += tokens
            self.accepted += 1
            self.controller.arrived(now, tokens)
            self._changed.notify()
        return request.future

    def drain(self) -> None:
        """Take no more requests; those that were taken are finished."""
        with self._changed:
            self.draining = True
            self._changed.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait until all are finished after `drain`; returns whether they are."""
        self._worker.join(timeout)
        return not self._worker.is_alive()

    def _work(self) -> None:
        try:
            self._work_on()
        except BaseException as error:  # nothing is computed any more: nobody shall wait for it
            with self._changed:
                self.draining = True
                for place in (*self._batch, *self._queue):
                    if not place.request.future.done():
                        place.request.future.set_exception(error)
            raise

    def _work_on(self) -> None:
        while True:
            with self._changed:
                while not self._ready():
                    self._changed.wait(self._left())
                if not self._queue:
                    return
                speedup = self.controller.choose(self.clock(), self.waiting)
                self._batch = self._taken()
            self._compute(self._batch, speedup)
            self._batch, self._computing = [], 0

    def _ready(self) -> bool:
        """Whether there is a batch to take, or nothing will come any more."""
        left = self._left()
        return self.draining or (left is not None and (left <= 0 or self.waiting >= self.batch_tokens))

    def _left(self) -> float | None:
        """Seconds until the oldest example has waited long enough; None without any."""
        return self._queue[0].request.arrived + self.linger - self.clock() if self._queue else None

    def _taken(self) -> list[_Place]:
        """A batch from the queue, without examples that nobody waits for."""
        now, places = self.clock(), list[_Place]()
        self._computing = 0
        while self._queue:
            tokens = len(self._queue[0].example.ids)
            if places and self._computing + tokens > self.batch_tokens:
                break
            place = self._queue.popleft()
            self.waiting -= tokens
            if place.request.wanted(now):
                places.append(place)
                self._computing += tokens
        return places

    def _compute(self, places: list[_Place], speedup: float) -> None:
        """Run a batch; where that fails, its examples one by one, so that only the one at fault is without answer."""
        if not places:
            return
        start = self.clock()
        try:
            rows = self.run([place.example for place in places], speedup)
            if len(rows) != len(places):
                raise SecateurError(f"The engine answered {len(rows)} of {len(places)} examples.")
        except Exception as error:  # whatever it is, the others are answered
            if len(places) > 1:
                for place in places:
                    self._compute([place], speedup)
            elif not places[0].request.future.done():
                self.answered += 1
                places[0].request.future.set_exception(error)
            return
        now, tokens = self.clock(), sum(len(place.example.ids) for place in places)
        self.metrics.batch(len(places), tokens)
        with self._changed:
            self.controller.computed(tokens, now - start)
        for place, row in zip(places, rows, strict=True):
            self._settle(place, row, speedup, now)

    def _settle(self, place: _Place, logits: Tensor, speedup: float, now: float) -> None:
        """Give an example its logits, and the request its answer with the last one."""
        request = place.request
        request.logits[place.number], request.speedups[place.number] = logits, speedup
        request.left -= 1
        if request.left or request.future.done():
            return
        order, taken = range(len(request.logits)), now - request.arrived
        self.metrics.answer(taken)
        with self._changed:
            self.controller.answered(now, taken)
            self.answered += 1
        request.future.set_result(
            Answer(
                [request.logits[n] for n in order],
                [request.speedups[n] for n in order],
                request.begun - request.arrived,
                now - request.begun,
            )
        )
