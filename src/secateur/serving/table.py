"""The speed-ups that serving may choose among, from the dial's table in a model's folder."""

from __future__ import annotations

import json
from pathlib import Path

from secateur.errors import SecateurError
from secateur.serving.controller import Row

FILE = "dial.json"


def rows_of(folder: str | Path, tokens: int | None, floor: float | None = None) -> list[Row]:
    """Rows of a folder's table, the slowest first; none of a folder without one, if none is needed.

    Args:
        folder: of a model.
        tokens: length at which the model's dial counts; None if it has no dial.
        floor: the least that the table's metric may be, in the unit of the table.

    Raises:
        SecateurError: no table, but a dial or a floor; a damaged table, or one made at another length; a floor, and
            no metrics or no row that keeps it.
    """
    path = Path(folder) / FILE
    make = f"run `secateur dial {folder} --task ...` first"
    if not path.is_file():
        if floor is not None or tokens is not None:
            raise SecateurError(f"Turning a dial needs a table of what each speed-up takes and scores: {make}.")
        return []
    try:
        table = json.loads(path.read_text("utf-8"))
        rows, length = table["rows"], table["setting"]["tokens"]
        found = sorted(
            (float(r["speedup"]), float(r["measured"]), next(iter(r.get("metrics", {}).values()), None)) for r in rows
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        raise SecateurError(f"'{path}' is damaged: {make}.") from None
    if not found or min(row[1] for row in found) <= 0:
        raise SecateurError(f"'{path}' has no rows, or rows without milliseconds: {make}.")
    if tokens not in (None, length):
        raise SecateurError(f"'{path}' counts at {length} tokens and the dial at {tokens}: {make}, without --tokens.")
    if floor is not None:
        scores = [score for *_, score in found if score is not None]
        if len(scores) < len(found):
            raise SecateurError(f"A floor needs metrics, and '{path}' has none for some rows: {make}.")
        if max(scores) < floor:
            raise SecateurError(f"No speed-up keeps the floor of {floor:g}: the best one has {max(scores):.4g}.")
        found = [row for row, score in zip(found, scores, strict=True) if score >= floor]
    return [Row(speedup, measured) for speedup, measured, _ in found]
