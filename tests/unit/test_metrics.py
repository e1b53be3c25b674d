"""Metrics by hand, evaluation in data order, the bootstrap against its slow twin."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from datasets import Dataset, DatasetDict
from torch import Tensor
from transformers import BertModel

from secateur.errors import InvalidData, InvalidModel
from secateur.tasks import Task, compute, evaluate, load_task, paired_bootstrap
from secateur.tasks.metrics import bootstrap_metric
from tests.unit import tiny_text


def task_of(num_labels: int, *metrics: str) -> Task:
    kind = "regression" if num_labels == 1 else "classification"
    return replace(tiny_text.task(), num_labels=num_labels, kind=kind, metric=metrics[0], metrics=metrics)


def one_hot(predictions: list[int], classes: int) -> Tensor:
    return torch.nn.functional.one_hot(torch.tensor(predictions), classes).float()


def test_two_classes_by_hand() -> None:
    labels = torch.tensor([1, 1, 1, 0, 0, 0, 0, 1])
    logits = one_hot([1, 1, 0, 0, 0, 1, 0, 1], 2)  # tp 3, fn 1, tn 3, fp 1
    found = compute(task_of(2, "accuracy", "f1", "matthews"), logits, labels)
    assert list(found) == ["accuracy", "f1", "matthews"]
    assert found == pytest.approx({"accuracy": 6 / 8, "f1": 6 / 8, "matthews": (9 - 1) / 16})


def test_three_classes_by_hand() -> None:
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    logits = one_hot([0, 1, 1, 1, 2, 0], 3)
    found = compute(task_of(3, "f1", "accuracy"), logits, labels)
    assert found == pytest.approx({"f1": (1 / 2 + 4 / 5 + 2 / 3) / 3, "accuracy": 4 / 6})


def test_correlations_by_hand() -> None:
    labels = torch.tensor([1.0, 2.0, 3.0, 4.0])
    logits = torch.tensor([[1.0], [3.0], [2.0], [14.0]])
    found = compute(task_of(1, "spearman", "pearson"), logits, labels)
    # deviations -4, -2, -3, 9 and -1.5, -0.5, 0.5, 1.5: 19 / sqrt(110 * 5)
    assert found == pytest.approx({"spearman": 0.8, "pearson": 19 / math.sqrt(550)})
    tied = compute(task_of(1, "spearman"), torch.tensor([[1.0], [1.0], [2.0], [3.0]]), labels)
    assert tied["spearman"] == pytest.approx(4.5 / math.sqrt(4.5 * 5))


def test_undefined_is_zero() -> None:
    flat = torch.ones(4, 1)
    assert compute(task_of(1, "pearson", "spearman"), flat, torch.arange(4.0)) == {"pearson": 0.0, "spearman": 0.0}
    assert compute(task_of(2, "matthews"), one_hot([0, 0], 2), torch.tensor([0, 1])) == {"matthews": 0.0}
    with pytest.raises(InvalidData, match="unknown metric"):
        compute(task_of(2, "bleu"), one_hot([0], 2), torch.tensor([0]))


def test_evaluate_gives_logits_in_data_order() -> None:
    task, words, model = tiny_text.task(), tiny_text.tokenizer(), tiny_text.model()
    model.train()
    found = evaluate(model, words, task, batch_size=7)
    assert model.training
    model.eval()
    with torch.inference_mode():
        single = [model(**words(text, return_tensors="pt")).logits[0] for text in task.split("validation")["text"]]
    torch.testing.assert_close(found.logits, torch.stack(single), atol=1e-5, rtol=0)
    assert found.labels.tolist() == list(task.split("validation")["label"])
    assert found.metrics == compute(task, found.logits, found.labels)
    few = evaluate(model, words, task, limit=5)
    torch.testing.assert_close(few.logits, found.logits[:5], atol=1e-5, rtol=0)


def test_evaluate_follows_the_model_s_order_of_labels() -> None:
    task, words, model = tiny_text.task(), tiny_text.tokenizer(), tiny_text.model()
    model.config.id2label = {0: "bad", 1: "good"}
    straight = evaluate(model, words, task)
    with torch.no_grad():
        model.classifier.weight.copy_(model.classifier.weight.flip(0))
        model.classifier.bias.copy_(model.classifier.bias.flip(0))
    model.config.id2label = {0: "good", 1: "bad"}
    turned = evaluate(model, words, task)
    assert turned.metrics["accuracy"] == straight.metrics["accuracy"]
    assert turned.labels.tolist() == (1 - straight.labels).tolist()


def test_evaluate_refuses_broken_models() -> None:
    task, words, model = tiny_text.task(), tiny_text.tokenizer(), tiny_text.model()
    with pytest.raises(InvalidModel, match="no logits"):
        evaluate(BertModel(model.config), words, task)
    with torch.no_grad():
        model.classifier.bias[0] = float("nan")
    with pytest.raises(InvalidModel, match="30 of 30 outputs are NaN"):
        evaluate(model, words, task)


def test_progress_goes_to_standard_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("secateur.progress.LINE_EVERY", 0.0)
    evaluate(tiny_text.model(), tiny_text.tokenizer(), tiny_text.task(), batch_size=15, progress=True)
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.splitlines()[-1].startswith("evaluating dataset (validation): 2/2 after")


@pytest.mark.parametrize("name", ["accuracy", "f1", "matthews"])
@pytest.mark.parametrize("classes", [2, 4])
def test_bootstrap_equals_compute_on_each_resample(name: str, classes: int) -> None:
    check_resamples(name, classes, torch.randint(classes, (60,), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_bootstrap_correlations_with_ties(name: str) -> None:
    check_resamples(name, 1, torch.randint(6, (60,), generator=torch.Generator().manual_seed(1)).double())


def check_resamples(name: str, outputs: int, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(60, outputs, generator=generator)
    if outputs == 1:
        logits = (logits * 2).round() + labels[:, None].float()
    task = task_of(outputs, name)
    rows = torch.randint(60, (20, 60), generator=generator)
    counts = torch.stack([torch.bincount(row, minlength=60) for row in rows]).double()
    expected = [compute(task, logits[row], labels[row])[name] for row in rows]
    assert bootstrap_metric(name, logits, labels, counts).tolist() == pytest.approx(expected, abs=1e-6)


def test_paired_bootstrap() -> None:
    labels = torch.tensor([0, 1] * 200)
    wrong = torch.arange(400) < 80
    exact = one_hot(labels.tolist(), 2)
    worse = torch.where(wrong[:, None], 1 - exact, exact)
    difference, low, high = paired_bootstrap("accuracy", worse, exact, labels)
    assert difference == pytest.approx(0.2)
    # binomial: standard deviation sqrt(0.2 * 0.8 / 400) = 0.02
    assert (low, high) == (pytest.approx(0.2 - 1.96 * 0.02, abs=0.005), pytest.approx(0.2 + 1.96 * 0.02, abs=0.005))
    assert paired_bootstrap("accuracy", exact, exact, labels) == (0.0, 0.0, 0.0)
    assert paired_bootstrap("accuracy", worse, exact, labels) == (difference, low, high)

    def accuracy(logits: Tensor, target: Tensor) -> float:
        return float((logits.argmax(-1) == target).double().mean())

    by_function = paired_bootstrap(accuracy, worse, exact, labels, n=100)
    assert by_function == pytest.approx(paired_bootstrap("accuracy", worse, exact, labels, n=100))


def test_paired_bootstrap_needs_the_same_examples() -> None:
    with pytest.raises(InvalidData, match="3 and 2 outputs, 3 labels"):
        paired_bootstrap("accuracy", torch.zeros(3, 2), torch.zeros(2, 2), torch.zeros(3))
    with pytest.raises(InvalidData, match="unknown metric"):
        paired_bootstrap("bleu", torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3))


def test_data_without_the_split() -> None:
    rows = Dataset.from_dict({"text": ["good", "bad"], "label": [0, 1]})
    with pytest.raises(InvalidData, match="no 'validation' split"):
        evaluate(tiny_text.model(), tiny_text.tokenizer(), load_task(DatasetDict(test=rows)))
