"""Unit tests of replaced words."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from datasets import Dataset, DatasetDict

import secateur
from secateur import run
from secateur.costs.budget import Budget, constraints
from secateur.errors import InvalidData, SecateurError
from secateur.tasks.augmenting import with_replaced_words
from secateur.train import fit
from tests.unit.tiny_text import BAD, FILLER, GOOD, model, tokenizer

ANGLES = {"good": 0.0, "fine": 0.1, "great": 0.3, "bad": 1.5, "poor": 1.6, "awful": 1.8}


def table() -> torch.Tensor:
    """Words on the unit circle, at the angles above; those that fill in are opposite, and longer."""
    tokens = tokenizer()
    angles = torch.tensor([ANGLES.get(tokens.decode([i]), 4.0) for i in range(20)])
    lengths = torch.tensor([1.0 if tokens.decode([i]) in ANGLES else 9.0 for i in range(20)])
    return torch.stack([angles.cos(), angles.sin()], dim=1) * lengths[:, None]


def texts(*rows: Any) -> secateur.Task:
    return splits({"text": list(rows), "label": [0, 1] * (len(rows) // 2)})


def splits(columns: dict[str, list[Any]]) -> secateur.Task:
    rows = Dataset.from_dict(columns)
    return secateur.load_task(DatasetDict(train=rows, validation=rows))


def train_of(task: secateur.Task, copies: int, **settings: Any) -> Dataset:
    found = with_replaced_words(task, tokenizer(), table(), copies, **settings).train
    assert found is not None
    return found


def test_words_become_their_neighbours_by_angle() -> None:
    task = texts("good, awful zzz!", "great bad  poor")
    found = train_of(task, 1, share=1.0, nearest=1)
    assert found["text"][:] == ["good, awful zzz!", "great bad  poor", "fine, poor zzz!", "fine poor  bad"]
    assert found["label"][:] == [0, 1, 0, 1]


def test_share_seed_and_copies() -> None:
    task = texts(*["good fine great bad poor awful"] * 200)
    first, again, other = (train_of(task, 2, seed=seed, nearest=2) for seed in (0, 0, 1))
    assert len(first) == 600
    assert first["text"][:] == again["text"][:] != other["text"][:]
    copies = [text.split() for text in first["text"][200:]]
    given = [*GOOD, *BAD]
    changed = sum(word != was for copy in copies for word, was in zip(copy, given, strict=True))
    assert changed / 2400 == pytest.approx(0.4, abs=0.04)  # four standard deviations
    assert {copy[0] for copy in copies} == {"good", "fine", "great"}


def test_lists_of_words_keep_their_length() -> None:
    task = splits({"tokens": [["good", "zzz", "bad"]] * 4, "tags": [["O", "B-x", "O"]] * 4})
    found = train_of(task, 1, share=1.0, nearest=1)
    assert found[4]["tokens"] == ["fine", "zzz", "poor"]
    assert found[4]["tags"] == found[0]["tags"]


def test_too_few_words_or_no_rows() -> None:
    task = texts("good bad", "the film")
    found = train_of(task, 1, nearest=len(FILLER) + 6)
    assert found["text"][2:] == ["good bad", "the film"]  # no word has so many neighbours
    with pytest.raises(InvalidData, match="no 'train' split"):
        with_replaced_words(replace(task, train=None), tokenizer(), table(), 1)


def test_bit_learns_from_them(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []

    def watched(model: Any, words: Any, task: secateur.Task, *rest: Any, **more: Any) -> None:
        seen.append(len(task.split("train")))
        fit(model, words, task, *rest, **more)

    monkeypatch.setattr(run, "fit", watched)
    with pytest.raises(SecateurError, match="augment needs distill"):
        secateur.Bit(augment=1, distill=False)
    method = secateur.Bit(augment=2, through=None, epochs=2, batch_size=10, batches=1, lr=1e-3)
    task = texts(*["good the film is very bad"] * 20)
    result = secateur.compress(model(), method, task=task, tokenizer=tokenizer(), seconds=0.05)
    assert result.budget["terms"][0]["met"]
    assert seen == [60]
    limits = constraints(Budget.parse("bits<=1"), model(), 1, 8, units=False)
    assert method.check(model(), limits, 20) == {"steps": 2 * 6}
