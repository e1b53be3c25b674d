"""Numbers of a service, in the text format of Prometheus."""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

CONTENT = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds, self.counts, self.sum = bounds, [0] * (len(bounds) + 1), 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.sum += value

    def lines(self, name: str) -> Iterator[str]:
        total = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {total}"


class Metrics:
    """What a service counts; any thread may add to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._requests: Counter[int] = Counter()
        self._tokens = 0
        self._batches, self._latency = Histogram(SIZES), Histogram(SECONDS)

    def request(self, status: int) -> None:
        """A request ended with a status."""
        with self._lock:
            self._requests[status] += 1

    def batch(self, examples: int, tokens: int) -> None:
        """A batch was computed."""
        with self._lock:
            self._batches.add(examples)
            self._tokens += tokens

    def answer(self, seconds: float) -> None:
        """A request was answered, so long after it had been put into the queue."""
        with self._lock:
            self._latency.add(seconds)

    def text(self, gauges: Mapping[str, float]) -> str:
        """All of them, with values of the moment by name."""
        with self._lock:
            requests = [f'secateur_requests_total{{status="{s}"}} {n}' for s, n in sorted(self._requests.items())]
            parts = [
                ("requests_total", "counter", requests),
                ("rejected_total", "counter", [f"secateur_rejected_total {self._requests[429]}"]),
                ("tokens_total", "counter", [f"secateur_tokens_total {self._tokens}"]),
                ("batch_examples", "histogram", self._batches.lines("secateur_batch_examples")),
                ("latency_seconds", "histogram", self._latency.lines("secateur_latency_seconds")),
                *((name, "gauge", [f"secateur_{name} {value:g}"]) for name, value in gauges.items()),
            ]
            return "".join(
                f"# TYPE secateur_{name} {kind}\n" + "".join(f"{line}\n" for line in lines)
                for name, kind, lines in parts
            )
