"""A class for each word (token classification): words to tokens and back, and the entities that BIO tags mark."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from secateur.errors import InvalidData

if TYPE_CHECKING:
    from datasets import Dataset

IGNORED = -100
"""Label of tokens that no metric and no loss counts: special ones, and all but a word's first."""


def align(labels: Sequence[int], words: Sequence[int | None]) -> list[int]:
    """Labels of tokens: a word's label at its first token, `IGNORED` at all others.

    Args:
        labels: of the words.
        words: for each token the word that it belongs to; None for special tokens.
    """
    before = (None, *words[:-1])
    return [IGNORED if word is None or word == last else labels[word] for word, last in zip(words, before, strict=True)]


def check_words(data: Dataset, words: str, label: str, where: str) -> None:
    """Refuse rows without words, or with another number of labels than of words.

    Raises:
        InvalidData: naming the first such row, counted from 1.
    """
    for row, (text, tags) in enumerate(zip(data[words][:], data[label][:], strict=True), start=1):
        if not text or tags is None or len(text) != len(tags) or any(part is None for part in (*text, *tags)):
            raise InvalidData(
                f"{where}: row {row} has {len(text or ())} words in {words!r} and {len(tags or ())} labels in "
                f"{label!r}: it needs a label for each of at least one word"
            )


def by_words(logits: Tensor, labels: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """For each example of a batch the logits (words, classes) and the labels (words,) of its words.

    Args:
        logits: (batch, tokens, classes).
        labels: (batch, tokens), as `align` gives them.
    """
    counted = labels != IGNORED
    return (
        [row[mask] for row, mask in zip(logits, counted, strict=True)],
        [row[mask] for row, mask in zip(labels, counted, strict=True)],
    )


def padded(logits: Sequence[Tensor], labels: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Examples of different lengths as (examples, most words, classes) and (examples, most words)."""
    return pad_sequence(list(logits), batch_first=True), pad_sequence(
        list(labels), batch_first=True, padding_value=IGNORED
    )


def entities(tags: Sequence[str]) -> set[tuple[int, int, str]]:
    """(first word, word after the last, type) of every entity that BIO tags mark.

    As the CoNLL-2003 evaluation reads them: an entity begins at B-x, and at an I-x that follows another type or O.
    """
    found = set()
    start, kind = 0, ""
    for place, tag in enumerate((*tags, "O")):
        mark, _, name = tag.partition("-")
        if kind and (mark != "I" or name != kind):
            found.add((start, place, kind))
            kind = ""
        if mark in ("B", "I") and not kind:
            start, kind = place, name
    return found


def entity_counts(logits: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
    """Entities of each example that were found, that were predicted, and that are there: (examples, 3) float64.

    An entity is found if a predicted one has its place and its type.

    Args:
        logits: (examples, words, classes).
        labels: (examples, words), `IGNORED` where there is no word.
        names: BIO tag of each class.
    """
    rows = []
    for predicted, actual in zip(logits.argmax(dim=-1).tolist(), labels.tolist(), strict=True):
        words = [i for i, label in enumerate(actual) if label != IGNORED]
        said, true = (entities([names[ids[i]] for i in words]) for ids in (predicted, actual))
        rows.append([len(said & true), len(said), len(true)])
    return torch.tensor(rows, dtype=torch.float64).reshape(-1, 3)


def are_bio(names: Sequence[str] | None) -> bool:
    """Whether class names are BIO tags: O, and B- or I- with a type."""
    return bool(names) and "O" in (names or ()) and all(n == "O" or n[:2] in ("B-", "I-") for n in names or ())


def renumbered(labels: Sequence[Any], new: Any) -> list[Any]:
    """Labels, or lists of them, each replaced by what `new` gives for it."""
    return [[new[i] for i in row] if isinstance(row, list) else new[row] for row in labels]
