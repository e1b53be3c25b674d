"""Seeded splits that keep class shares and never put one text on both sides."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import replace

from secateur.errors import InvalidData
from secateur.tasks.task import Task


def split_rows(
    keys: Sequence[Hashable], strata: Sequence[Hashable], shares: dict[str, float], seed: int
) -> dict[str, list[int]]:
    """Split rows at random.

    Rows with the same key (the same text) stay together, so that no split holds a row of another. Each stratum (class)
    is split in the same shares, rounded; the first split takes what is left over.

    Args:
        keys: one per row.
        strata: one per row; a group of rows counts for the stratum of its first row.
        shares: split name → share of the rows; the first is the largest.
        seed: of the shuffle.

    Returns:
        Split name → row numbers in ascending order.

    Raises:
        InvalidData: if there are too few different texts for the splits.
    """
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for row, key in enumerate(keys):
        groups[key].append(row)
    if len(groups) < len(shares):
        raise InvalidData(
            f"{len(groups)} different texts are too few to split into {', '.join(shares)}: add rows, or give a folder "
            "with one file per split"
        )
    by_stratum: dict[Hashable, list[list[int]]] = defaultdict(list)
    for rows in groups.values():
        by_stratum[strata[rows[0]]].append(rows)
    first, *others = shares
    chosen: dict[str, list[list[int]]] = {name: [] for name in shares}
    generator = random.Random(seed)
    for stratum in sorted(by_stratum, key=repr):
        members = by_stratum[stratum]
        generator.shuffle(members)
        start = 0
        for name in others:
            count = round(shares[name] * len(members))
            chosen[name] += members[start : start + count]
            start += count
        chosen[first] += members[start:]
    for name in others:  # tiny data: every split gets a row, from the class with the most left
        if not chosen[name]:
            chosen[name].append(_spare(chosen[first], strata))
    return {name: sorted(row for rows in part for row in rows) for name, part in chosen.items()}


def held_out(task: Task, share: float, most: int, seed: int) -> Task:
    """The task with a part of its training rows in place of the validation rows, so that those stay unseen.

    Args:
        task: needs training rows.
        share: of the training rows that are held out.
        most: rows that are held out at most.
        seed: of the choice.

    Raises:
        InvalidData: the task has no training rows, or too few different texts.
    """
    rows = task.split("train")
    keys = list(zip(*(map(repr, rows[column][:]) for column in task.text_columns), strict=True))
    classes = list(map(str, rows[task.label_column][:])) if task.kind == "classification" else [""] * len(rows)
    share = min(share, most / max(len(rows), 1))
    parts = split_rows(keys, classes, {"train": 1 - share, "held out": share}, seed)
    return replace(task, train=rows.select(parts["train"]), validation=rows.select(parts["held out"]))


def _spare(groups: list[list[int]], strata: Sequence[Hashable]) -> list[int]:
    """Take one group of the most frequent stratum out of `groups`."""
    sizes: dict[Hashable, int] = defaultdict(int)
    for rows in groups:
        sizes[strata[rows[0]]] += 1
    largest = max(sizes, key=lambda stratum: sizes[stratum])
    index = next(i for i, rows in enumerate(groups) if strata[rows[0]] == largest)
    return groups.pop(index)
