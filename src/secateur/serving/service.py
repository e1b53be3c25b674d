"""An engine behind a queue: what servers of any kind share."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig

from secateur.errors import SecateurError
from secateur.runtime import Engine, Precision, load
from secateur.serving.batching import Batcher, Example
from secateur.serving.controller import Controller, Row
from secateur.serving.metrics import Metrics
from secateur.serving.reading import Reader, Writer
from secateur.serving.refusals import Refused
from secateur.serving.table import rows_of, speedups_of, timed

READING = 4 << 20
"""Bytes of requests that may wait for the tokenizer."""
TOKENS = 32
"""Of the examples that a model without a dial is timed on."""


@dataclass(frozen=True)
class Settings:
    """How a folder is served.

    Attributes:
        precision: of products, as `secateur.runtime.load` has it; its default if None.
        threads: of each batch; torch's if None.
        target_ms: what 95 % of the answers shall take at most, from the queue to the logits, by turning the dial; it
            stays as the folder has it if None.
        floor: the least that the metric of the dial's table may be.
        max_tokens: of a batch.
        queue_tokens: that may wait.
        max_wait_ms: requests that would wait longer, even at the fastest speed-up, are refused; the target if None, or
            a second without one.
        linger_ms: that a batch that is not full waits for more.
        max_examples: of a request.
    """

    precision: Precision | None = None
    threads: int | None = None
    target_ms: float | None = None
    floor: float | None = None
    max_tokens: int = 1024
    queue_tokens: int = 32768
    max_wait_ms: float | None = None
    linger_ms: float = 0.0
    max_examples: int = 256

    def __post_init__(self) -> None:
        for name in ("max_tokens", "queue_tokens", "max_examples"):
            if getattr(self, name) < 1:
                raise SecateurError(f"{name} is at least 1, not {getattr(self, name)}.")
        for name in ("max_wait_ms", "linger_ms"):
            if (getattr(self, name) or 0) < 0:
                raise SecateurError(f"{name} is not negative: {getattr(self, name):g}.")
        if self.target_ms is not None and self.target_ms <= 0:
            raise SecateurError(f"target_ms is above 0, not {self.target_ms:g}.")
        if self.floor is not None and self.target_ms is None:
            raise SecateurError("A floor limits how far a target turns the dial: give one too.")


class Service:
    """Answers requests by one engine.

    Args:
        engine: that computes.
        config: of the model.
        settings: see there.
        dial: what the engine may be turned to, the slowest first.
    """

    def __init__(self, engine: Engine, config: Any, settings: Settings, dial: Sequence[Row]) -> None:
        self.engine, self.settings, self.dial = engine, settings, dial
        self.metrics, self.writer = Metrics(), Writer(config)
        wait = settings.max_wait_ms if settings.max_wait_ms is not None else settings.target_ms or 1000.0
        self.batcher = Batcher(
            self._run,
            Controller(dial, None if settings.target_ms is None else settings.target_ms / 1e3),
            self.metrics,
            batch_tokens=settings.max_tokens,
            queue_tokens=settings.queue_tokens,
            most_wait=wait / 1e3,
            linger=settings.linger_ms / 1e3,
        )
        self._reader = Reader(engine, settings.max_examples)
        self._pool = ThreadPoolExecutor(1, "secateur-reader")  # one: a tokenizer is not for several at a time
        self._reading = 0  # bytes
        self._speedup = engine.speedup  # that was last asked for

    @classmethod
    def open(cls, folder: str | Path, settings: Settings | None = None) -> Service:
        """Serve a model folder.

        Raises:
            SecateurError: the folder cannot be run, or its dial cannot keep what is asked for.
        """
        chosen = settings or Settings()
        engine = load(folder, chosen.precision, threads=chosen.threads)
        dropping, speedups = engine.plan.dropping, [engine.speedup]
        length = dropping.edit.tokens if dropping else None
        if chosen.target_ms is not None:
            speedups = speedups_of(folder, length, chosen.floor) or speedups
            if speedups[-1] > engine.reach:
                raise SecateurError(
                    f"'{folder}' reaches {engine.reach:.3g}, its table {speedups[-1]:g}: run `secateur dial` again."
                )
        tokens = min(length or TOKENS, engine.plan.longest)
        examples = max(1, chosen.max_tokens // tokens)
        seconds = timed(engine, speedups, examples, tokens)
        made = cls(engine, AutoConfig.from_pretrained(str(folder)), chosen, rows_of(speedups, seconds))
        made.batcher.controller.computed(examples * tokens, seconds[0])
        return made

    async def predict(self, body: bytes) -> dict[str, Any]:
        """Answer a request.

        Raises:
            Refused: it is too large, there are too many, or the service is about to end.
            InvalidData: it cannot be read.
        """
        self.batcher.check()
        if self._reading and self._reading + len(body) > READING:
            raise Refused(429, "Too much text is waiting to be read.", 1)
        self._reading += len(body)
        try:
            examples = await asyncio.get_running_loop().run_in_executor(self._pool, self._reader.examples, body)
        finally:
            self._reading -= len(body)
        answer = await asyncio.wrap_future(self.batcher.put(examples))
        rows = zip(examples, answer.logits, answer.speedups, strict=True)
        return {
            "predictions": [{**self.writer.prediction(e, logits), "speedup": speedup} for e, logits, speedup in rows],
            "queued_ms": round(1e3 * answer.queued, 3),
            "computed_ms": round(1e3 * answer.computed, 3),
        }

    def health(self) -> dict[str, Any]:
        """Whether requests are taken, and what answers them."""
        info = self.engine.info()
        return {
            "status": "draining" if self.batcher.draining else "ready",
            **{name: info[name] for name in ("tier", "precision", "threads")},
            "speedup": self.batcher.controller.speedup,
            "speedups": [row.speedup for row in self.dial],
        }

    def numbers(self) -> str:
        """Metrics in the text format of Prometheus."""
        return self.metrics.text({"queue_tokens": self.batcher.waiting, "speedup": self.batcher.controller.speedup})

    def drain(self) -> None:
        """Take no more requests, and return once those that were taken are answered."""
        self.batcher.drain()
        self.batcher.join()

    def close(self) -> None:
        """Answer what was taken, and give memory back."""
        self.drain()
        self._pool.shutdown()
        self.engine.close()

    def _run(self, examples: Sequence[Example], speedup: float) -> Sequence[Tensor]:
        if speedup != self._speedup:
            self.engine.speedup = self._speedup = speedup
        lengths = [len(example.ids) for example in examples]
        types = None
        if any(example.types is not None for example in examples):
            types = torch.tensor([t for e in examples for t in e.types or [0] * len(e.ids)])
        logits = self.engine.encoded(
            torch.tensor([i for example in examples for i in example.ids]), torch.tensor(lengths), types
        )
        return logits.unbind() if self.engine.plan.head.first else logits.split(lengths)
