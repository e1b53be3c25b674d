"""Progress on standard error: a bar in a terminal, an occasional plain line elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sized
from contextlib import contextmanager
from typing import TypeVar

Item = TypeVar("Item")

LINE_EVERY = 15.0  # seconds between plain lines: rare enough for a log file, often enough to show life

Advance = Callable[[int, str], None]


@contextmanager
def progress(description: str, total: int | None, *, show: bool = True) -> Iterator[Advance]:
    """Show the progress of a block that counts its own steps.

    Args:
        description: what is being done.
        total: number of steps, None if unknown.
        show: False makes the returned function do nothing.

    Yields:
        A function of (steps done so far, note); the note is a short text such as the current loss.
    """
    if not show:
        yield lambda done, note: None
    elif sys.stderr.isatty():
        with _bar(description, total) as advance:
            yield advance
    else:
        yield _lines(description, total)


def track(iterable: Iterable[Item], description: str, total: int | None = None, *, show: bool = True) -> Iterator[Item]:
    """Yield the items of an iterable and show how many have been handed out.

    Args:
        iterable: what to iterate over.
        description: what is being done.
        total: number of items; by default `len(iterable)` if it has one.
        show: False yields in silence.
    """
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with progress(description, total, show=show) as advance:
        for done, item in enumerate(iterable, start=1):
            yield item
            advance(done, "")


@contextmanager
def _bar(description: str, total: int | None) -> Iterator[Advance]:
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda done, note: bar.update(task, completed=done, note=note)


def _lines(description: str, total: int | None) -> Advance:
    """Return a function that prints a line when the last one is `LINE_EVERY` seconds old."""
    start = last = time.monotonic()
    of = f"/{total}" if total is not None else ""

    def advance(done: int, note: str) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= LINE_EVERY:
            last = now
            print(f"{description}: {done}{of} after {now - start:.0f} s {note}".rstrip(), file=sys.stderr, flush=True)

    return advance
