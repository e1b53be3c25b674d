"""A task: data, what its columns mean, and how a model is judged on it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from secateur.errors import InvalidData
from secateur.tasks.tagging import renumbered

if TYPE_CHECKING:
    from datasets import Dataset, DatasetDict
    from transformers import PreTrainedModel

Kind = Literal["classification", "regression", "token_classification"]
SPLITS = ("train", "validation", "test")


@dataclass(frozen=True)
class Task:
    """Data with its meaning.

    Attributes:
        name: a short name for reports.
        train: rows to learn from; None when the data has none. So are `validation` and `test`.
        validation: rows to choose by.
        test: rows to report on.
        text_columns: one column of text, or two for sentence pairs; of lists of words for token classification.
        label_column: class ids from 0 (classification), numbers (regression), or a list of class ids, one for each
            word (token classification).
        kind: `"classification"`, `"regression"` or `"token_classification"`.
        num_labels: number of classes; 1 for regression.
        label_names: name of each class id; None if the data only has ids.
        metric: the metric that decides.
        metrics: every metric that is reported, the deciding one first.
    """

    name: str
    train: Dataset | None
    validation: Dataset | None
    test: Dataset | None
    text_columns: tuple[str, ...]
    label_column: str
    kind: Kind
    num_labels: int
    label_names: tuple[str, ...] | None
    metric: str
    metrics: tuple[str, ...]

    def split(self, name: str) -> Dataset:
        """Return one split.

        Raises:
            InvalidData: if the task lacks it.
        """
        found = self.splits()
        if name not in found:
            raise InvalidData(
                f"task {self.name!r} has no {name!r} split; it has {', '.join(found)}: add a {name} file to the data "
                "or name another split"
            )
        return found[name]

    def splits(self) -> dict[str, Dataset]:
        """Return the splits that are there, by name."""
        pairs = ((name, getattr(self, name)) for name in SPLITS)
        return {name: data for name, data in pairs if data is not None}


def check_labels(task: Task, model: PreTrainedModel) -> Task:
    """Check that a model's head fits a task, and return the task with its class ids in the model's order.

    A model that never named its classes (`LABEL_0`, ...) and a task without names are matched by count. Names are
    compared ignoring case.

    Args:
        task: the task.
        model: a classifier of sequences or tokens.

    Returns:
        The task itself, or a copy whose class ids were permuted to the model's order.

    Raises:
        InvalidData: if the numbers or the names of the labels differ.
    """
    names = _model_names(model)
    count = model.config.num_labels
    if task.kind == "regression":
        if count != 1:
            raise InvalidData(
                f"task {task.name!r} is a regression (1 output) but the model has {count} labels "
                f"({_show(names)}): use a model fine-tuned on it, or `secateur finetune` first"
            )
        return task
    if count != task.num_labels:
        raise InvalidData(
            f"task {task.name!r} has {task.num_labels} labels ({_show(task.label_names)}) but the model has {count} "
            f"({_show(names)}): use a model fine-tuned on this task, or `secateur finetune` first"
        )
    if names is None or task.label_names is None:
        return task
    ours, theirs = [_fold(name) for name in task.label_names], [_fold(name) for name in names]
    if ours == theirs:
        return task
    if sorted(ours) != sorted(theirs):
        raise InvalidData(
            f"the labels of task {task.name!r} ({_show(task.label_names)}) are not the model's ({_show(names)}): "
            "rename them in the data or in the model's config.id2label, or `secateur finetune` first"
        )
    return _permuted(task, [theirs.index(name) for name in ours], names)


def fingerprint(data: Task | Dataset | DatasetDict) -> str:
    """Return a hash of the content of the data: the same on every machine, for every file format.

    Args:
        data: a task (its text and label columns count), a dataset, or splits of one.

    Returns:
        16 hexadecimal digits of a SHA-256.
    """
    if isinstance(data, Task):
        columns = [*data.text_columns, data.label_column]
        splits: Mapping[Any, Any] = {name: split.select_columns(columns) for name, split in data.splits().items()}
    else:
        splits = data if isinstance(data, Mapping) else {"": data}
    digest = hashlib.sha256()
    for name in sorted(splits, key=str):
        columns = sorted(splits[name].column_names)
        digest.update(json.dumps([str(name), columns, len(splits[name])]).encode())
        for chunk in splits[name].select_columns(columns).iter(batch_size=1000):
            rows = [chunk[column] for column in columns]
            digest.update(json.dumps(rows, default=repr, ensure_ascii=False).encode())
    return digest.hexdigest()[:16]


def label_config(task: Task) -> dict[str, Any]:
    """Return the entries of a model's config that describe the task's labels."""
    if task.kind == "regression":
        return {"num_labels": 1, "problem_type": "regression"}
    names = task.label_names or tuple(f"LABEL_{i}" for i in range(task.num_labels))
    problem = {"problem_type": "single_label_classification"} if task.kind == "classification" else {}
    return {
        "num_labels": task.num_labels,
        **problem,
        "id2label": dict(enumerate(names)),
        "label2id": {name: i for i, name in enumerate(names)},
    }


def _model_names(model: PreTrainedModel) -> tuple[str, ...] | None:
    """Return the model's class names by id, or None if they are the generic ones."""
    id2label = {int(i): str(name) for i, name in (model.config.id2label or {}).items()}
    if all(name.upper() == f"LABEL_{i}" for i, name in id2label.items()):
        return None
    return tuple(id2label[i] for i in sorted(id2label))


def _permuted(task: Task, new_id: list[int], names: tuple[str, ...]) -> Task:
    """Return the task with class `i` renumbered `new_id[i]`."""

    def renumber(data: Dataset | None) -> Dataset | None:
        if data is None:
            return None
        ids = renumbered(data[task.label_column][:], new_id)
        return data.remove_columns(task.label_column).add_column(task.label_column, ids)

    return replace(
        task,
        train=renumber(task.train),
        validation=renumber(task.validation),
        test=renumber(task.test),
        label_names=tuple(names),
    )


def _fold(name: str) -> str:
    return name.strip().casefold()


def _show(names: tuple[str, ...] | None) -> str:
    return ", ".join(names) if names else "unnamed"
