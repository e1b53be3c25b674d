"""A class for each word: columns, alignment, entities, F1 and its bootstrap, by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Sequence, Value
from torch import Tensor
from transformers import AutoModelForTokenClassification

import secateur
from secateur.errors import InvalidData
from secateur.tasks import batches, check_labels, evaluate, load_task, paired_bootstrap
from secateur.tasks.batching import encode
from secateur.tasks.metrics import bootstrap_metric, compute
from secateur.tasks.tagging import IGNORED, align, entities, entity_counts
from secateur.train import finetune
from secateur.train.losses import distilled
from tests.conftest import tiny_model
from tests.contract.test_methods import WORDS, tiny_tokenizer

NAMES = ("B-x", "I-x", "O")


def tagged(rows: int = 40, seed: int = 0) -> Dataset:
    """Random words; those of the upper half are entities, neighbours make one."""
    generator = torch.Generator().manual_seed(seed)
    words, tags = [], []
    for _ in range(rows):
        n = int(torch.randint(1, 9, (1,), generator=generator))
        ids = torch.randint(0, 94, (n,), generator=generator).tolist()
        inside = [i >= 47 for i in ids]
        words.append([WORDS[i] for i in ids])
        tags.append(
            [
                "O" if not now else "I-x" if before else "B-x"
                for now, before in zip(inside, [False, *inside], strict=False)
            ]
        )
    return Dataset.from_dict({"tokens": words, "ner_tags": tags})


def as_logits(ids: list[list[int]], classes: int = 3) -> Tensor:
    width = max(map(len, ids))
    full = torch.tensor([row + [0] * (width - len(row)) for row in ids])
    return torch.nn.functional.one_hot(full, classes).float()


def test_only_a_words_first_token_counts() -> None:
    assert align([7, 8], [None, 0, 0, 1, None]) == [IGNORED, 7, IGNORED, 8, IGNORED]


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O O", set()),
        ("B-x I-x O B-x", {(0, 2, "x"), (3, 4, "x")}),
        ("B-x B-x I-x", {(0, 1, "x"), (1, 3, "x")}),
        ("I-x O I-y I-y", {(0, 1, "x"), (2, 4, "y")}),  # an I- without a B- begins one
        ("B-x I-y", {(0, 1, "x"), (1, 2, "y")}),
    ],
)
def test_entities(tags: str, found: set[tuple[int, int, str]]) -> None:
    assert entities(tags.split()) == found


def test_entity_f1_by_hand() -> None:
    """Row 1: one of two found, with one that is not there; row 2: the only one found. F1 = 2·2 / (3 + 3)."""
    labels = torch.tensor([[0, 1, 2, 0], [0, IGNORED, IGNORED, IGNORED]])
    logits = as_logits([[0, 1, 0, 2], [0]])
    counts = entity_counts(logits, labels, NAMES)
    assert counts.tolist() == [[1, 2, 2], [1, 1, 1]]
    task = load_task(tagged())
    assert compute(task, logits, labels) == pytest.approx({"entity_f1": 4 / 6, "accuracy": 3 / 5})
    drawn = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    assert bootstrap_metric("entity_f1", logits, labels, drawn, NAMES).tolist() == pytest.approx([0.5, 1.0])
    assert paired_bootstrap("entity_f1", logits, logits, labels, n=10, names=NAMES) == (0, 0, 0)


def test_lists_of_words_are_a_task() -> None:
    task = load_task(tagged(), seed=1)
    assert (task.kind, task.text_columns, task.label_column) == ("token_classification", ("tokens",), "ner_tags")
    assert (task.num_labels, task.label_names, task.metrics) == (3, NAMES, ("entity_f1", "accuracy"))
    assert (len(task.train or []), len(task.validation or []), len(task.test or [])) == (32, 4, 4)


def test_named_classes_of_words_and_tags_that_are_no_entities() -> None:
    names = ["NOUN", "VERB"]
    features = Features({"words": Sequence(Value("string")), "labels": Sequence(ClassLabel(names=names))})
    rows = Dataset.from_dict({"words": [["a", "b"], ["c"]], "labels": [[0, 1], [1]]}, features=features)
    task = load_task(DatasetDict({"train": rows, "validation": rows}))
    assert (task.label_names, task.metric, task.metrics) == (("NOUN", "VERB"), "accuracy", ("accuracy",))
    assert task.train is not None
    assert list(task.train["labels"]) == [[0, 1], [1]]


@pytest.mark.parametrize(
    ("content", "options", "message"),
    [
        ({"tokens": [["a", "b"]], "tags": [["O"]]}, {}, "row 1 has 2 words in 'tokens' and 1 labels in 'tags'"),
        ({"tokens": [["a"], []], "tags": [["O"], []]}, {}, "row 2 has 0 words"),
        ({"text": ["a b"], "tags": [["O", "O"]]}, {}, "needs a column of lists of words"),
        ({"tokens": [["a"]], "tags": [[0.5]]}, {}, "holds a number for each word"),
        ({"tokens": [["a"]], "words": [["b"]], "tags": [["O"]]}, {}, "needs a column of lists of words"),
        ({"tokens": [["a"]], "tags": [["O"]]}, {"text": "tokens,tags"}, "takes one column of words, not 2"),
    ],
)
def test_mistakes(content: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidData, match=message):
        load_task(Dataset.from_dict(content), **options)


def test_batches_carry_a_label_for_each_token() -> None:
    rows = Dataset.from_dict({"tokens": [["w1", "w2 w3"], ["w4"]], "tags": [["O", "B-x"], ["O"]]})
    task = load_task(DatasetDict({"train": rows, "validation": rows}))
    encoded = encode(task, "train", tiny_tokenizer())
    assert encoded.labels == [[IGNORED, 1, 0, IGNORED, IGNORED], [IGNORED, 1, IGNORED]]
    batch = next(iter(batches(task, "train", tiny_tokenizer())))
    assert batch["labels"].shape == batch["input_ids"].shape
    assert int((batch["labels"] != IGNORED).sum()) == 3


def test_check_labels_renumbers_words() -> None:
    task = load_task(tagged())
    model = tiny_model("bert")
    model.config.num_labels = 3  # type: ignore[union-attr]
    model.config.id2label = {0: "O", 1: "B-x", 2: "I-x"}  # type: ignore[union-attr]
    found = check_labels(task, model)  # type: ignore[arg-type]
    assert found.label_names == ("O", "B-x", "I-x")
    assert task.train is not None
    assert found.train is not None
    moved = {0: 1, 1: 2, 2: 0}
    assert list(found.train["ner_tags"]) == [[moved[i] for i in row] for row in task.train["ner_tags"]]


def test_distillation_counts_words_only() -> None:
    """Outputs of special and padding tokens, which nobody reads, must not enter the loss."""
    torch.manual_seed(0)
    teacher, student = tiny_tagger(0), tiny_tagger(1)
    batch = {
        "input_ids": torch.randint(5, 99, (2, 6)),
        "labels": torch.tensor([[IGNORED, 0, 1, IGNORED, 2, IGNORED]] * 2),
    }
    loss = distilled(teacher, 1.0)(student, batch)
    with torch.no_grad():
        counted = batch["labels"] != IGNORED
        p, q = (torch.log_softmax(m(**batch).logits[counted] / 2, -1) for m in (teacher, student))
    assert loss.item() == pytest.approx((4 * (p.exp() * (p - q)).sum() / 6).item(), rel=1e-5)


def tiny_tagger(seed: int) -> Any:
    torch.manual_seed(seed)
    config = tiny_model("bert").config  # type: ignore[union-attr]
    config.num_labels = 3
    return AutoModelForTokenClassification.from_config(config).eval()


def test_a_tagger_is_trained_compressed_and_opened(tmp_path: Path) -> None:
    """The whole way: a head for words, OPTIN and LATE on it, a folder that transformers opens."""
    task = load_task(tagged(400))
    base = tiny_model("bert")
    finetune(base, tiny_tokenizer(), task, tmp_path / "dense", epochs=12, lr=3e-3, batch_size=8, dropout=0.0)  # type: ignore[arg-type]
    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "dense")
    before = evaluate(model, tiny_tokenizer(), task)
    assert before.metrics["accuracy"] > 0.7
    assert before.logits.shape[:2] == before.labels.shape
    late = secateur.Late(train_speedup=1.5, epochs=2, lr=1e-3, batch_size=16, examples=32)
    for method, budget in (("optin", "macs<=80%"), (late, "speedup>=1.3")):
        out = tmp_path / str(budget[:4])
        result = secateur.compress(tmp_path / "dense", method, task=task, budget=budget, out=out, seconds=0.05)
        assert result.after.macs <= 0.8 * result.before.macs
        assert set(result.after.metrics) == {"entity_f1", "accuracy"}
        again = AutoModelForTokenClassification.from_pretrained(out)
        assert evaluate(again, tiny_tokenizer(), task).metrics == result.after.metrics
        assert "AutoModelForTokenClassification" in (out / "README.md").read_text()
