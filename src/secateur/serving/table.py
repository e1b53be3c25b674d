"""The speed-ups that serving may choose among: from the dial's table in a model's folder, timed with the engine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from secateur.errors import SecateurError
from secateur.runtime import Engine
from secateur.serving.controller import Row

FILE = "dial.json"
ROUNDS = 5
"""Batches that each speed-up is timed by."""
SECONDS = 2.0
"""After which there is no further round."""


def speedups_of(folder: str | Path, tokens: int | None, floor: float | None = None) -> list[float]:
    """Speed-ups in a folder's table, the least first; none of a folder without one, if none is needed.

    Args:
        folder: of a model.
        tokens: length at which the model's dial counts; None if it has no dial.
        floor: the least that the table's metric may be, in the unit of the table.

    Raises:
        SecateurError: a floor without a dial; a dial without a table, or with a damaged one, or one made at another
            length; a floor, and no metrics or no row that keeps it.
    """
    path = Path(folder) / FILE
    make = f"run `secateur dial {folder} --task ...` first"
    if tokens is None and floor is not None:
        raise SecateurError(
            f"A floor limits how far a dial turns, and '{folder}' has none: compress with 'late' first."
        )
    if tokens is None:
        return []
    if not path.is_file():
        raise SecateurError(f"Turning a dial needs a table of what each speed-up scores: {make}.")
    try:
        table = json.loads(path.read_text("utf-8"))
        length = table["setting"]["tokens"]
        found = {float(r["speedup"]): next(iter(r.get("metrics", {}).values()), None) for r in table["rows"]}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SecateurError(f"'{path}' is damaged: {make}.") from None
    if tokens != length:
        raise SecateurError(f"'{path}' counts at {length} tokens and the dial at {tokens}: {make}, without --tokens.")
    if floor is None:
        return sorted(found)
    scores = {speedup: score for speedup, score in found.items() if score is not None}
    if not scores:
        raise SecateurError(f"A floor needs metrics, and '{path}' has none: {make}.")
    if max(scores.values()) < floor:
        raise SecateurError(f"No speed-up keeps the floor of {floor:g}: the best has {max(scores.values()):.4g}.")
    return sorted(speedup for speedup, score in scores.items() if score >= floor)


def timed(engine: Engine, speedups: Sequence[float], examples: int, tokens: int) -> list[float]:
    """Seconds of a batch of so many examples of so many tokens at each speed-up, the least of a few rounds."""
    ids = torch.randint(len(engine.plan.words), (examples * tokens,), generator=torch.Generator().manual_seed(0))
    lengths, found, begun = torch.full((examples,), tokens), dict.fromkeys(speedups, math.inf), time.perf_counter()
    for _ in range(ROUNDS):
        for speedup in speedups:
            if speedup != engine.speedup:
                engine.speedup = speedup
            start = time.perf_counter()
            engine.encoded(ids, lengths)
            found[speedup] = min(found[speedup], time.perf_counter() - start)
        if time.perf_counter() - begun > SECONDS:
            break
    return list(found.values())


def rows_of(speedups: Sequence[float], seconds: Sequence[float]) -> list[Row]:
    """Rows for a controller, without those that are no faster than one before them."""
    rows: list[Row] = []
    for speedup, took in zip(speedups, seconds, strict=True):
        factor = seconds[0] / took
        if not rows or factor > rows[-1].factor:
            rows.append(Row(speedup, factor))
    return rows
