"""The speed-ups that serving may choose among, from the dial's table in a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.errors import SecateurError
from secateur.serving.controller import Row

FILE = "dial.json"


def rows_of(folder: str | Path, floor: float | None = None) -> list[Row]:
    """Rows of a folder's table, the slowest first; only the dense one of a folder without a table.

    Args:
        folder: of a model.
        floor: the least that the table's metric may be, in the unit of the table.

    Raises:
        SecateurError: a floor, and no table, a table without metrics, or no row that keeps it; a damaged table.
    """
    path, dense = Path(folder) / FILE, Row(1.0, 1.0)
    make = f"run `secateur dial {folder} --task ...` first"
    if not path.is_file():
        if floor is not None:
            raise SecateurError(f"A floor needs a table of what each speed-up scores: {make}.")
        return [dense]
    try:
        rows = json.loads(path.read_text("utf-8"))["rows"]
        found = sorted(
            (float(r["speedup"]), float(r["measured"]), next(iter(r.get("metrics", {}).values()), None)) for r in rows
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SecateurError(f"'{path}' is damaged: {make}.") from None
    if not found or min(row[1] for row in found) <= 0:
        raise SecateurError(f"'{path}' has no rows, or rows without milliseconds: {make}.")
    if floor is not None:
        scores = [score for *_, score in found if score is not None]
        if len(scores) < len(found):
            raise SecateurError(f"A floor needs metrics, and '{path}' has none for some rows: {make}.")
        if max(scores) < floor:
            raise SecateurError(f"No speed-up keeps the floor of {floor:g}: the best one has {max(scores):.4g}.")
        found = [row for row, score in zip(found, scores, strict=True) if score >= floor]
    return [Row(speedup, measured) for speedup, measured, _ in found]
