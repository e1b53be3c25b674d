"""Rows put aside for a search: no text on both sides, classes in proportion, a cap, and none of validation."""

from __future__ import annotations

from collections import Counter

import pytest
from datasets import Dataset, DatasetDict

from secateur.errors import InvalidData
from secateur.tasks import Task, held_out, load_task


def task(rows: int = 200) -> Task:
    texts = [f"text {i // 2 if i < 40 else i}" for i in range(rows)]  # the first forty come twice
    train = Dataset.from_dict({"text": texts, "label": [int(i % 4 == 0) for i in range(rows)]})
    other = Dataset.from_dict({"text": ["unseen a", "unseen b"], "label": [0, 1]})
    return load_task(DatasetDict(train=train, validation=other))


def test_rows_are_put_aside() -> None:
    given = task()
    found = held_out(given, 0.2, 10_000, seed=0)
    learn, judge = (Counter(found.split(name)["text"]) for name in ("train", "validation"))
    assert learn + judge == Counter(given.split("train")["text"])
    assert not set(learn) & set(judge)
    assert sum(judge.values()) == pytest.approx(40, abs=8)
    assert sum(found.split("validation")["label"]) / sum(judge.values()) == pytest.approx(0.25, abs=0.08)
    assert found.test is given.test
    again = held_out(given, 0.2, 10_000, seed=0)
    assert again.split("validation")["text"] == found.split("validation")["text"]
    assert held_out(given, 0.2, 10_000, seed=1).split("validation")["text"] != found.split("validation")["text"]


def test_there_is_a_cap() -> None:
    assert len(held_out(task(), 0.5, 20, seed=0).split("validation")) == pytest.approx(20, abs=5)


def test_without_training_rows_there_is_nothing_to_put_aside() -> None:
    given = task()
    with pytest.raises(InvalidData, match="no 'train' split"):
        held_out(type(given)(**{**given.__dict__, "train": None}), 0.2, 100, seed=0)
