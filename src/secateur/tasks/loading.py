"""`load_task`: from a name, a file, a folder or a dataset to a `Task`."""

from __future__ import annotations

import difflib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from secateur.errors import InvalidData
from secateur.tasks.columns import check_text, class_names, find_label, find_text, find_words, is_list, read_labels
from secateur.tasks.files import read_file, read_folder
from secateur.tasks.presets import PRESETS, preset_name, preset_splits
from secateur.tasks.split import split_rows
from secateur.tasks.tagging import are_bio, check_words
from secateur.tasks.task import SPLITS, Kind, Task

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict

METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1", "matthews"),
    "regression": ("spearman", "pearson"),
    "token_classification": ("entity_f1", "accuracy"),
}
DEFAULT_METRICS: dict[Kind, tuple[str, ...]] = {
    "classification": ("accuracy", "f1"),
    "regression": ("spearman", "pearson"),
    "token_classification": ("entity_f1", "accuracy"),
}
THREE_WAYS = {"train": 0.8, "validation": 0.1, "test": 0.1}
TWO_WAYS = {"train": 0.9, "validation": 0.1}


def load_task(
    spec: str | Path | Dataset | DatasetDict | Task,
    *,
    text: str | Sequence[str] | None = None,
    label: str | None = None,
    metric: str | None = None,
    seed: int = 0,
) -> Task:
    """Load a task.

    Args:
        spec: a GLUE task (`"sst2"`, `"glue/sst2"`), read from `$SECATEUR_DATA/<task>` if that is set and from the hub
            otherwise; a CSV, TSV, JSON-lines or Parquet file; a folder with train, validation and test files; a
            dataset.
        text: the text column, or two of them (also as `"a,b"`); found by type and common names if None.
        label: the label column; found by common names if None. Floats mean regression, whole numbers and
            strings classes. Lists of words with lists of labels (Parquet, JSON lines) mean token classification.
        metric: the metric that decides; the task's usual one if None.
        seed: of the split, when the data has no validation rows: 80/10/10 for one table, 90/10 of the training
            rows else.

    Raises:
        InvalidData: if the data cannot be had, read or understood; the message says what to do.
    """
    if isinstance(spec, Task):
        return _with_metric(spec, metric)
    columns = tuple(part.strip() for part in text.split(",")) if isinstance(text, str) else text
    preset = preset_name(spec) if isinstance(spec, str) else None
    if preset is None:
        name, splits = _open(spec)
        return _with_metric(_build(name, splits, columns, label, None, seed), metric)
    known = PRESETS[preset]
    task = _build(preset, preset_splits(preset), columns or known.columns, label, known.label_names, seed)
    if task.kind != ("regression" if known.label_names is None else "classification"):
        raise InvalidData(f"the labels of {preset} are of the wrong type for a {task.kind} task: get its data again")
    return _with_metric(replace(task, metric=known.metrics[0], metrics=known.metrics), metric)


def _open(spec: str | Path | Dataset | DatasetDict) -> tuple[str, dict[str, Dataset]]:
    """Return a name and the splits of anything but a preset; a table without splits is called `all`."""
    from datasets import Dataset

    if isinstance(spec, Dataset):
        return "dataset", {"all": spec}
    if isinstance(spec, Mapping):
        return "dataset", {str(name): data for name, data in spec.items() if data is not None}
    path = Path(spec).expanduser()
    if path.is_dir():
        return path.resolve().name, read_folder(path)
    if path.is_file():
        return path.stem, {"all": read_file(path)}
    near = difflib.get_close_matches(str(spec), PRESETS, n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise InvalidData(
        f"no task, file or folder {str(spec)!r}{hint}: name one of {', '.join(PRESETS)}, or give a .csv, .tsv, .jsonl "
        "or .parquet file, a folder with train and validation files, or a datasets.Dataset"
    )


def _build(
    name: str,
    splits: dict[str, Dataset],
    text: Sequence[str] | None,
    label: str | None,
    names: tuple[str, ...] | None,
    seed: int,
) -> Task:
    """Find the columns, turn labels into ids, split what has no splits."""
    data = _named_splits(name, splits)
    sample = next(iter(data.values()))
    label = find_label(sample, label)
    tags = is_list(sample, label)
    columns = (find_words(sample, text, label),) if tags else find_text(sample, text, label)
    for split, rows in data.items():
        if tags:
            check_words(rows, columns[0], label, _where(name, split))
        else:
            check_text(rows, columns, _where(name, split))
    values = {split: read_labels(rows, label, _where(name, split)) for split, rows in data.items()}
    if names is None and len(data) > 0:
        names = class_names(sample, label)
    data, values = _without_hidden(data, values, known_names=names is not None)
    kind: Kind = "regression" if _are_floats(values) else "classification"
    if tags and kind == "regression":
        raise InvalidData(
            f"{name}: column {label!r} holds a number for each word: write classes, as names or whole numbers"
        )
    kind = "token_classification" if tags else kind
    if kind == "regression":
        names, count = None, 1
    else:
        names, count, values = _class_ids(name, values, names)
    data = {split: _relabel(rows, label, values[split], kind) for split, rows in data.items()}
    data = _split(data, columns, label, kind, seed)
    metrics = DEFAULT_METRICS[kind]
    if tags and not are_bio(names):
        metrics = ("accuracy",)
    return Task(
        name=name,
        train=data.get("train"),
        validation=data.get("validation"),
        test=data.get("test"),
        text_columns=columns,
        label_column=label,
        kind=kind,
        num_labels=count,
        label_names=names,
        metric=metrics[0],
        metrics=metrics,
    )


def _named_splits(name: str, splits: dict[str, Dataset]) -> dict[str, Dataset]:
    """Keep the splits that a task knows, under its names."""
    aliases = {"dev": "validation", "val": "validation", "valid": "validation", "validation_matched": "validation"}
    data = {aliases.get(split, split): rows.with_format(None) for split, rows in splits.items()}
    data = {split: rows for split, rows in data.items() if split in (*SPLITS, "all")}
    if not data:
        raise InvalidData(
            f"{name} has the splits {', '.join(splits) or 'none'}: name them train, validation and test "
            "(a DatasetDict with those keys)"
        )
    for split, rows in data.items():
        if len(rows) == 0:
            raise InvalidData(f"{_where(name, split)} has no rows: it needs one row per example")
    return data


def _without_hidden(
    data: dict[str, Dataset], values: dict[str, list[Any]], known_names: bool
) -> tuple[dict[str, Dataset], dict[str, list[Any]]]:
    """Drop a test split whose labels are all -1: GLUE's way of hiding them."""
    hidden = "test" in values and len(values) > 1 and all(value == -1 for value in values["test"])
    if hidden and (known_names or any(-1 not in values[split] for split in values if split != "test")):
        return ({k: v for k, v in data.items() if k != "test"}, {k: v for k, v in values.items() if k != "test"})
    return data, values


def _are_floats(values: Mapping[str, list[Any]]) -> bool:
    """Tell regression from classification: any float makes all labels numbers."""
    types = {type(value) for column in values.values() for value in column}
    if float in types and str in types:
        raise InvalidData("the labels are numbers in one split and names in another: write them alike")
    return float in types


def _class_ids(
    name: str, values: dict[str, list[Any]], names: tuple[str, ...] | None
) -> tuple[tuple[str, ...] | None, int, dict[str, list[int]]]:
    """Number the classes: strings in sorted order, whole numbers as they are if they run from 0, else in order.

    Returns:
        (class names or None, number of classes, ids of each split).
    """
    reference = next((split for split in ("train", "all") if split in values), None)
    known: set[Any] = set(values[reference]) if reference else {v for column in values.values() for v in column}
    types = {type(value) for column in values.values() for value in column}
    if str in types and len(types) > 1:
        raise InvalidData(f"{name}: the labels mix names and numbers: write them alike")
    if names is not None:
        known = set(names) if types == {str} else set(range(len(names)))
    for split, column in values.items():
        unseen = sorted({value for value in column if value not in known}, key=str)
        if unseen:
            expected = ", ".join(map(str, sorted(known, key=str)[:8]))
            raise InvalidData(
                f"{_where(name, split)} has the label {unseen[0]!r}, which is not among those known ({expected}): "
                "correct it, drop its rows, or add it to the training rows"
            )
    _check_classes(name, known, max(len(column) for column in values.values()))
    ordered = _order(known, names, types == {str})
    ids = {value: i for i, value in enumerate(ordered)}
    if names is None and (types == {str} or ordered != list(range(len(ordered)))):
        names = tuple(str(value) for value in ordered)
    return names, len(ordered), {split: [ids[value] for value in column] for split, column in values.items()}


def _order(known: set[Any], names: tuple[str, ...] | None, strings: bool) -> list[Any]:
    return list(names) if names is not None and strings else sorted(known)


def _check_classes(name: str, known: set[Any], rows: int) -> None:
    if len(known) < 2:
        raise InvalidData(
            f"{name}: every row has the same label ({next(iter(known))!r}): a task needs two classes or more"
        )
    if len(known) > max(20, rows // 2):
        raise InvalidData(
            f"{name}: {len(known)} different labels in {rows} rows are no classes: write numbers with a decimal point "
            "for regression, or name another column with label= of load_task (--label)"
        )


def _relabel(rows: Dataset, label: str, values: list[Any], kind: Kind) -> Dataset:
    """Replace the label column by plain ids or numbers."""
    if kind == "token_classification":
        ids = iter(values)
        return rows.remove_columns(label).add_column(label, [[next(ids) for _ in row] for row in rows[label][:]])
    number = int if kind == "classification" else float
    return rows.remove_columns(label).add_column(label, [number(value) for value in values])


def _split(data: dict[str, Dataset], columns: tuple[str, ...], label: str, kind: Kind, seed: int) -> dict[str, Dataset]:
    """Cut validation (and test) rows out of data that came without them."""
    if "all" in data:
        source, shares, rest = data["all"], THREE_WAYS, {}
    elif "train" in data and "validation" not in data:
        source, shares, rest = data["train"], TWO_WAYS, {k: v for k, v in data.items() if k != "train"}
    else:
        return data
    keys: list[Hashable] = [
        tuple(" ".join(text.split() if isinstance(text, str) else text).casefold() for text in texts)
        for texts in zip(*(source[column][:] for column in columns), strict=True)
    ]
    strata: list[Hashable] = list(source[label][:]) if kind == "classification" else [0] * len(source)
    parts = split_rows(keys, strata, shares, seed)
    return {split: source.select(rows) for split, rows in parts.items()} | rest


def _where(name: str, split: str) -> str:
    """Name a split in an error."""
    return name if split == "all" else f"{name} ({split})"


def _with_metric(task: Task, metric: str | None) -> Task:
    if metric is None:
        return task
    if metric not in METRICS[task.kind]:
        raise InvalidData(f"metric {metric!r} does not fit a {task.kind} task: use {' or '.join(METRICS[task.kind])}")
    return replace(task, metric=metric, metrics=(metric, *(m for m in task.metrics if m != metric)))
