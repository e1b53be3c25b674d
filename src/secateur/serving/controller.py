"""Which speed-up the next batch gets: arithmetic on measured times, without a clock of its own."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple

WINDOW = 5.0
"""Seconds that are looked back upon, and that all must have been calm for before the dial goes down."""
CALM = 0.5
"""Share of the target that latencies are clearly below."""
LOAD = 0.7
"""Share of its time that a slower row may be busy with what arrives."""
DECAY = 0.9
"""What a batch's weight falls to with each that follows it."""
LEAST = 20
"""Answers that a percentile is taken of."""


class Row(NamedTuple):
    """A row of a dial's table.

    Attributes:
        speedup: that the dial is turned to.
        factor: how many times as fast as the first row it was measured.
    """

    speedup: float
    factor: float


class Controller:
    """Chooses among the rows of a dial's table so that 95 % of the answers come within a target.

    It goes up at once, as far as is needed for what waits to be done within the target, or by one row if the
    measured percentile is above it. It comes down to the slowest row that would do, once that has held for a whole
    window: what waits, and the percentile, are below half the target, and what arrives keeps it busy for 70 % of its
    time at most.

    Args:
        rows: from the slowest to the fastest.
        target: seconds; None stays at the first one.
    """

    def __init__(self, rows: Sequence[Row], target: float | None) -> None:
        self.rows, self.target, self.place = list(rows), target, 0
        self._answers: deque[tuple[float, float]] = deque(maxlen=512)  # when, seconds
        self._arrivals: deque[tuple[float, int]] = deque()  # when, tokens
        self._arrived = 0
        self._seconds = self._tokens = 0.0  # of the batches computed, those of long ago weigh less
        self._calm_since: float | None = None

    @property
    def speedup(self) -> float:
        """Of the present row."""
        return self.rows[self.place].speedup

    def wait(self, tokens: int, place: int | None = None) -> float:
        """Seconds that so many tokens take at a row, the fastest if None; 0 before anything was measured."""
        at_first = self._seconds / self._tokens if self._tokens else 0.0
        return tokens * at_first / self.rows[-1 if place is None else place].factor

    def percentile(self) -> float:
        """Seconds that 95 % of the answers of the window took at most; 0 if they are too few to say."""
        found = sorted(seconds for _, seconds in self._answers)
        return found[math.ceil(0.95 * len(found)) - 1] if len(found) >= LEAST else 0.0

    def arrived(self, now: float, tokens: int) -> None:
        """Tokens were put into the queue."""
        self._forget(now)
        self._arrivals.append((now, tokens))
        self._arrived += tokens

    def computed(self, tokens: int, seconds: float) -> None:
        """A batch was computed at the present row."""
        self._seconds = DECAY * self._seconds + seconds * self.rows[self.place].factor
        self._tokens = DECAY * self._tokens + tokens

    def answered(self, now: float, seconds: float) -> None:
        """A request was answered, so many seconds after it had arrived."""
        self._answers.append((now, seconds))

    def choose(self, now: float, tokens: int) -> float:
        """The speed-up of the next batch.

        Args:
            now: seconds, of any clock.
            tokens: that wait, those of the batch among them.
        """
        if self.target is None:
            return self.speedup
        self._forget(now)
        place, last, p95 = self.place, len(self.rows) - 1, self.percentile()
        if self.wait(tokens, place) > self.target:
            faster = range(place + 1, last)
            self._turn(next((p for p in faster if self.wait(tokens, p) <= self.target), last))
        elif p95 > self.target:
            self._turn(min(place + 1, last))
        else:
            slower = next((p for p in range(place) if self._would_do(p, tokens)), None)
            if slower is None or p95 > CALM * self.target:
                self._calm_since = None
            elif self._calm_since is None:
                self._calm_since = now
            elif now - self._calm_since >= WINDOW:
                self._turn(slower)
        return self.speedup

    def _would_do(self, place: int, tokens: int) -> bool:
        calm = self.wait(tokens, place) <= CALM * (self.target or 0)
        return calm and self.wait(self._arrived, place) <= LOAD * WINDOW

    def _turn(self, place: int) -> None:
        """Go to a row; what was measured at another one says nothing of it."""
        self._calm_since = None
        if place != self.place:
            self.place = place
            self._answers.clear()

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] <= now - WINDOW:
            self._arrived -= self._arrivals.popleft()[1]
        while self._answers and self._answers[0][0] <= now - WINDOW:
            self._answers.popleft()
