"""Which columns hold the text and the label, and what the labels are."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from secateur.errors import InvalidData

if TYPE_CHECKING:
    from datasets import Dataset

PAIRS = (
    ("sentence1", "sentence2"),
    ("premise", "hypothesis"),
    ("question1", "question2"),
    ("question", "sentence"),
    ("question", "passage"),
    ("question", "context"),
    ("question", "answer"),
    ("query", "passage"),
    ("query", "document"),
    ("text1", "text2"),
    ("text_a", "text_b"),
    ("sentence_a", "sentence_b"),
)
SINGLES = ("text", "sentence", "review", "content", "comment", "tweet", "message", "document", "body", "question")
WORDS = ("tokens", "words")
LABELS = ("label", "labels", "target", "score", "rating", "class", "category", "sentiment", "stars", "y")
TAGS = ("ner_tags", "tags", "pos_tags", "chunk_tags", "upos")
STRINGS = ("string", "large_string", "string_view")


def find_text(data: Dataset, wanted: Sequence[str] | None, label: str) -> tuple[str, ...]:
    """Return the one or two columns of text.

    Args:
        data: any split.
        wanted: columns named by the user, or None to go by type and common names.
        label: the label column, which is not text.

    Raises:
        InvalidData: if they cannot be told; the message lists the columns found.
    """
    if wanted is not None:
        if not 1 <= len(wanted) <= 2:
            raise InvalidData(f"text takes one column, or two for sentence pairs, not {len(wanted)} ({_found(data)})")
        for column in wanted:
            _require(data, column, "text")
            if not _is_text(data, column):
                raise InvalidData(
                    f"column {column!r} holds no text ({_found(data)}): name another with text= of load_task (--text)"
                )
        return tuple(wanted)
    texts = [column for column in data.column_names if column != label and _is_text(data, column)]
    by_name = {column.casefold(): column for column in texts}
    for pair in PAIRS:
        if all(name in by_name for name in pair):
            return tuple(by_name[name] for name in pair)
    for name in SINGLES:
        if name in by_name:
            return (by_name[name],)
    if len(texts) == 1:
        return (texts[0],)
    problem = "several columns could be the text" if texts else "no column of text"
    raise InvalidData(f"{problem} ({_found(data)}): name it with text= of load_task (--text)")


def find_label(data: Dataset, wanted: str | None) -> str:
    """Return the label column: the one the user named, or the one with a common name.

    Raises:
        InvalidData: if it cannot be told; the message lists the columns found.
    """
    if wanted is not None:
        _require(data, wanted, "label")
        return wanted
    by_name = {column.casefold(): column for column in data.column_names}
    for name in (*LABELS, *TAGS):
        if name in by_name:
            return by_name[name]
    raise InvalidData(f"no label column ({_found(data)}): name it with label= of load_task (--label)")


def find_words(data: Dataset, wanted: Sequence[str] | None, label: str) -> str:
    """Return the column of lists of words, for a label column of lists.

    Raises:
        InvalidData: if it cannot be told; the message lists the columns found.
    """
    if wanted is not None:
        if len(wanted) != 1:
            raise InvalidData(f"a label for each word takes one column of words, not {len(wanted)} ({_found(data)})")
        _require(data, wanted[0], "text")
    lists = [column for column in wanted or data.column_names if column != label and is_list(data, column)]
    lists = [column for column in lists if getattr(data.features[column].feature, "dtype", None) in STRINGS]
    named = [column for column in lists if column.casefold() in WORDS]
    if len(lists) != 1 and len(named) != 1:
        raise InvalidData(
            f"column {label!r} holds lists, a label for each word, which needs a column of lists of words "
            f"({_found(data)}): name it with text= of load_task (--text), or another label with label= (--label)"
        )
    return named[0] if len(named) == 1 else lists[0]


def is_list(data: Dataset, column: str) -> bool:
    """Whether a column holds lists."""
    return hasattr(data.features[column], "feature")


def check_text(data: Dataset, columns: Iterable[str], where: str) -> None:
    """Refuse missing text.

    Raises:
        InvalidData: naming the column and the first such row, counted from 1.
    """
    for column in columns:
        _require(data, column, "text")
        for row, value in enumerate(data[column][:], start=1):
            if value is None:
                raise InvalidData(f"{where}: column {column!r} is empty in row {row}: fill it in or drop the row")


def read_labels(data: Dataset, column: str, where: str) -> list[Any]:
    """Return the labels of a split as plain numbers or strings; those of words one row after the other.

    Args:
        data: the split.
        column: its label column.
        where: named in errors.

    Raises:
        InvalidData: if one is missing, not finite, or not a number or string.
    """
    _require(data, column, "label")
    values = list(data[column][:])
    if is_list(data, column):
        return [value for row in values for value in row]
    for row, value in enumerate(values, start=1):
        if value is None or value == "" or (isinstance(value, float) and not math.isfinite(value)):
            raise InvalidData(
                f"{where}: label {column!r} is missing or not finite in row {row} ({value!r}): fill it in or drop "
                "the row"
            )
        if not isinstance(value, str | int | float):
            raise InvalidData(
                f"{where}: label {column!r} holds {type(value).__name__}s; one number or name per row is needed, "
                "name another column with label= of load_task (--label)"
            )
    return values


def class_names(data: Dataset, column: str) -> tuple[str, ...] | None:
    """Return the class names that a dataset carries with its integer labels, or None."""
    feature = data.features[column]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    return tuple(str(name) for name in names) if names else None


def _is_text(data: Dataset, column: str) -> bool:
    return getattr(data.features[column], "dtype", None) in STRINGS


def _require(data: Dataset, column: str, flag: str) -> None:
    if column not in data.column_names:
        raise InvalidData(f"no column {column!r} ({_found(data)}): name one of them with {flag}= (--{flag})")


def _found(data: Dataset) -> str:
    return "columns found: " + ", ".join(str(column) for column in data.column_names)
