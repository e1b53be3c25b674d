"""What other processes do on this machine while something is timed."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import psutil

BUSY = 0.2
"""Share of the machine's processors above which times are no longer those of an idle machine."""

SHORTEST = 0.5
"""Seconds, of all processors together, below which the system's own count is too coarse to judge by."""


@contextmanager
def watched() -> Iterator[None]:
    """Warn if meanwhile others keep more than a fifth of the machine's processors busy."""
    before, own = psutil.cpu_times()._asdict(), time.process_time()
    yield
    share = share_of_others(before, psutil.cpu_times()._asdict(), time.process_time() - own)
    if share > BUSY:
        warnings.warn(
            f"Other processes kept {share:.0%} of this machine busy while this was timed: milliseconds are longer than "
            "on an idle machine, and ratios less sure. Time again when it is idle.",
            stacklevel=4,  # who asked for a sample
        )


def share_of_others(before: Mapping[str, float], after: Mapping[str, float], own: float) -> float:
    """What others took of all processors' time.

    Args:
        before: `psutil.cpu_times()` by name, seconds since the machine started.
        after: the same later.
        own: seconds of this process between the two.
    """
    spent = {name: after[name] - before[name] for name in after if not name.startswith("guest")}  # in "user" already
    total = sum(spent.values())
    if total < SHORTEST:
        return 0.0
    return max(0.0, total - spent["idle"] - spent.get("iowait", 0.0) - own) / total
