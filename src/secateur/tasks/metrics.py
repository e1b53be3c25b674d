"""Metrics, the evaluation of a model, and whether a difference between two models is real."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import InvalidData, InvalidModel
from secateur.progress import track
from secateur.tasks.batching import Batches, batches, token_limit
from secateur.tasks.heads import head_class, share_padding
from secateur.tasks.tagging import IGNORED, by_words, entity_counts, padded
from secateur.tasks.task import Task, check_labels, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "Evaluation",
    "bootstrap_metric",
    "compute",
    "evaluate",
    "evaluate_batches",
    "evaluate_together",
    "fingerprint",
    "paired_bootstrap",
]

CHUNK = 250  # resamples at a time: bounds the memory of the bootstrap


@dataclass(frozen=True)
class Evaluation:
    """What a model scores on a split.

    Attributes:
        metrics: metric → fraction (0.9 is 90 %), in the task's order.
        logits: (examples, outputs) in the order of the data, float32; (examples, words, outputs) for token
            classification, 0 beyond an example's words.
        labels: (examples,) class ids in the model's order, or numbers; (examples, words), -100 beyond.
    """

    metrics: dict[str, float]
    logits: Tensor
    labels: Tensor


def compute(task: Task, logits: Tensor, labels: Tensor) -> dict[str, float]:
    """Return the task's metrics as fractions.

    Correlations and Matthews' coefficient are 0 where they are undefined (constant predictions, fewer than two
    examples).

    Args:
        task: names the metrics.
        logits: (examples, outputs).
        labels: (examples,).
    """
    if task.kind == "token_classification":
        once = torch.ones(1, len(labels), dtype=torch.float64)
        names = task.label_names or ()
        return {name: float(bootstrap_metric(name, logits, labels, once, names)) for name in task.metrics}
    return {name: _one(name, task.num_labels, logits, labels) for name in task.metrics}


def _one(name: str, classes: int, logits: Tensor, labels: Tensor) -> float:
    from torchmetrics.functional import classification as f
    from torchmetrics.functional import pearson_corrcoef, spearman_corrcoef

    if name in ("pearson", "spearman"):
        predicted, target = logits.reshape(-1).double(), labels.reshape(-1).double()
        if len(target) < 2 or predicted.unique().numel() < 2 or target.unique().numel() < 2:
            return 0.0
        correlate = pearson_corrcoef if name == "pearson" else spearman_corrcoef
        return float(correlate(predicted, target))
    predicted, target = logits.argmax(dim=-1), labels.long()
    if name == "accuracy":
        return float(f.multiclass_accuracy(predicted, target, num_classes=classes, average="micro"))
    if name == "f1" and classes == 2:
        return float(f.binary_f1_score(predicted, target))
    if name == "f1":
        return float(f.multiclass_f1_score(predicted, target, num_classes=classes, average="macro"))
    if name == "matthews":
        return float(f.multiclass_matthews_corrcoef(predicted, target, num_classes=classes))
    raise InvalidData(f"unknown metric {name!r}: use accuracy, f1, matthews, pearson or spearman")


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    split: str = "validation",
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    limit: int | None = None,
    progress: bool = False,
) -> Evaluation:
    """Run a model over a split, in the model's own precision.

    Args:
        model: a classifier of sequences or tokens, or a regressor.
        tokenizer: of the model.
        task: the data; class ids are brought into the model's order.
        split: `"train"`, `"validation"` or `"test"`.
        batch_size: examples in a batch.
        max_length: tokens beyond this are cut off; the tokenizer's and the model's limit (at most 512) if None.
        limit: the first so many examples only.
        progress: show progress on standard error.

    Raises:
        InvalidData: if the split is missing or the labels are not the model's.
        InvalidModel: if the outputs are not finite, or not one row of logits per example.
    """
    task = check_labels(task, model)
    longest = min(max_length or token_limit(tokenizer, model), token_limit(tokenizer, model))
    data = batches(task, split, tokenizer, batch_size=batch_size, max_length=longest, limit=limit)
    share_padding(model, tokenizer)
    return evaluate_batches(model, task, data, f"evaluating {task.name} ({split})", progress=progress)


def evaluate_batches(
    model: PreTrainedModel, task: Task, data: Batches, label: str = "evaluating", *, progress: bool = False
) -> Evaluation:
    """Run a model over batches that were made once, as `evaluate` does.

    Args:
        model: a classifier of sequences or tokens, or a regressor.
        task: what the batches are of, with class ids in the model's order.
        data: all examples, in any order.
        label: of the progress.
        progress: show progress on standard error.

    Raises:
        InvalidModel: if the outputs are not finite, or not one row of logits per example.
    """
    (found,) = evaluate_together(model, task, data, lambda forward: [forward()], label, progress=progress)
    return found


def evaluate_together(
    model: PreTrainedModel,
    task: Task,
    data: Batches,
    run: Callable[[Callable[[], Tensor]], list[Tensor]],
    label: str = "evaluating",
    *,
    progress: bool = False,
) -> list[Evaluation]:
    """Evaluate several variants of a model, batch by batch, as `evaluate_batches` does one.

    Args:
        model: a classifier of sequences or tokens, or a regressor.
        task: what the batches are of, with class ids in the model's order.
        data: all examples, in any order.
        run: given a forward pass on a batch, logits of each variant, in the same order for each batch.
        label: of the progress.
        progress: show progress on standard error.

    Raises:
        InvalidModel: as there.
    """
    training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            parts = [
                run(partial(_logits, model, batch, head_class(task))) for batch in track(data, label, show=progress)
            ]
    finally:
        model.train(training)
    return [_evaluation(model, task, data, list(variant)) for variant in zip(*parts, strict=True)]


def _evaluation(model: PreTrainedModel, task: Task, data: Batches, parts: list[Tensor]) -> Evaluation:
    """The metrics of logits, batch by batch."""
    back = torch.argsort(torch.tensor(data.order))
    answers = [batch["labels"] for batch in data]
    if task.kind == "token_classification":
        words = [by_words(*pair) for pair in zip(parts, answers, strict=True)]
        logits, labels = padded([w for pair in words for w in pair[0]], [w for pair in words for w in pair[1]])
    else:
        logits, labels = torch.cat(parts), torch.cat(answers)
    logits, labels = logits[back], labels[back]
    finite = torch.isfinite(logits).flatten(1).all(dim=-1)
    if not bool(finite.all()):
        raise InvalidModel(
            f"{int((~finite).sum())} of {len(logits)} outputs are NaN or infinite: the weights are damaged or overflow "
            f"in {model.dtype}; load the model with dtype=torch.float32"
        )
    return Evaluation(compute(task, logits, labels), logits, labels)


def _logits(model: PreTrainedModel, batch: dict[str, Tensor], cls: Any) -> Tensor:
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items() if name != "labels"}
    logits = getattr(model(**inputs), "logits", None)
    if logits is None or logits.dim() != 1 + batch["labels"].dim():
        kind = "text" if batch["labels"].dim() == 1 else "token"
        raise InvalidModel(
            f"{type(model).__name__} gives no logits per {kind}: open it with {cls.__name__}, or `secateur finetune` "
            "it first"
        )
    return torch.as_tensor(logits).float().cpu()


def paired_bootstrap(
    metric: str | Callable[[Tensor, Tensor], float],
    a_logits: Tensor,
    b_logits: Tensor,
    labels: Tensor,
    n: int = 2000,
    seed: int = 0,
    names: Sequence[str] = (),
) -> tuple[float, float, float]:
    """Return how much better `b` is than `a` on the same examples, with its 95 % percentile interval.

    Args:
        metric: the name of a metric, or a function of (logits, labels).
        a_logits: (examples, outputs) of the model before.
        b_logits: (examples, outputs) of the model after.
        labels: (examples,).
        n: resamples with replacement; both models see the same ones.
        seed: of the resamples.
        names: of the classes, for "entity_f1".

    Returns:
        (metric of b - metric of a, lower bound, upper bound).

    Raises:
        InvalidData: if the examples are not as many on each side, or there are none.
    """
    size = len(labels)
    if size == 0 or len(a_logits) != size or len(b_logits) != size:
        raise InvalidData(
            f"a paired comparison needs the same examples: {len(a_logits)} and {len(b_logits)} outputs, {size} labels"
        )
    generator = torch.Generator().manual_seed(seed)
    differences = []
    for start in range(0, n, CHUNK):
        rows = torch.randint(size, (min(CHUNK, n - start), size), generator=generator)
        if callable(metric):
            pairs = [metric(b_logits[row], labels[row]) - metric(a_logits[row], labels[row]) for row in rows]
            differences.append(torch.tensor(pairs, dtype=torch.float64))
        else:
            counts = torch.zeros(rows.shape, dtype=torch.float64)
            counts.scatter_add_(1, rows, torch.ones_like(counts))
            differences.append(
                bootstrap_metric(metric, b_logits, labels, counts, names)
                - bootstrap_metric(metric, a_logits, labels, counts, names)
            )
    if callable(metric):
        point = metric(b_logits, labels) - metric(a_logits, labels)
    else:
        once = torch.ones(1, size, dtype=torch.float64)
        point = float(
            bootstrap_metric(metric, b_logits, labels, once, names)
            - bootstrap_metric(metric, a_logits, labels, once, names)
        )
    low, high = torch.quantile(torch.cat(differences), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return point, low, high


def bootstrap_metric(name: str, logits: Tensor, labels: Tensor, counts: Tensor, names: Sequence[str] = ()) -> Tensor:
    """Return a metric on many resamples at once, equal to `compute` on each.

    Args:
        name: of the metric.
        logits: (examples, outputs).
        labels: (examples,).
        counts: (resamples, examples): how often each example was drawn; float64.
        names: of the classes, for "entity_f1".

    Returns:
        (resamples,) float64.
    """
    if name in ("pearson", "spearman"):
        x, y = logits.reshape(-1).double(), labels.reshape(-1).double()
        if name == "pearson":
            return _correlation(x.expand_as(counts), y.expand_as(counts), counts)
        return _correlation(_ranks(x, counts), _ranks(y, counts), counts)
    if logits.dim() == 3:
        return _f1_of_counts(counts @ _word_counts(name, logits, labels, names))
    classes = max(logits.shape[-1], 2)
    cells = torch.nn.functional.one_hot(labels.long() * classes + logits.argmax(dim=-1), classes * classes).double()
    confusion = (counts @ cells).reshape(-1, classes, classes)
    total = confusion.sum(dim=(1, 2))
    hits = confusion.diagonal(dim1=1, dim2=2)
    actual, predicted = confusion.sum(dim=2), confusion.sum(dim=1)
    if name == "accuracy":
        return hits.sum(dim=1) / total
    if name == "f1":
        return _f1(hits, actual + predicted)
    if name == "matthews":
        covariance = hits.sum(dim=1) * total - (actual * predicted).sum(dim=1)
        spread = (total**2 - (actual**2).sum(dim=1)) * (total**2 - (predicted**2).sum(dim=1))
        return torch.where(spread > 0, covariance / spread.clamp_min(1e-30).sqrt(), torch.zeros_like(spread))
    raise InvalidData(f"unknown metric {name!r}: use accuracy, f1, matthews, pearson or spearman")


def _word_counts(name: str, logits: Tensor, labels: Tensor, names: Sequence[str]) -> Tensor:
    """(hits, predicted, actual) of each example, (examples, 3) float64: of entities, or of words for accuracy."""
    if name == "entity_f1":
        return entity_counts(logits, labels, names)
    if name != "accuracy":
        raise InvalidData(f"unknown metric {name!r} of words: use entity_f1 or accuracy")
    words = (labels != IGNORED).sum(dim=1)
    return torch.stack([(logits.argmax(dim=-1) == labels).sum(dim=1), words, words], dim=1).double()


def _f1_of_counts(sums: Tensor) -> Tensor:
    """F1 from (hits, predicted, actual) in the last axis, 0 where nothing is; the share of hits if they are equal."""
    hits, predicted, actual = sums.unbind(dim=-1)
    return 2 * hits / (predicted + actual).clamp_min(1)


def _f1(hits: Tensor, size: Tensor) -> Tensor:
    """F1 of class 1 for two classes; else the mean over the classes that occur. hits, size: (resamples, classes)."""
    each = torch.where(size > 0, 2 * hits / size.clamp_min(1), torch.zeros_like(size))
    if hits.shape[1] == 2:
        return each[:, 1]
    return each.sum(dim=1) / (size > 0).sum(dim=1).clamp_min(1)


def _ranks(values: Tensor, counts: Tensor) -> Tensor:
    """Mean ranks within each resample: (resamples, examples).

    Equal values drawn g times in all, after c smaller draws, have the ranks c+1 ... c+g, on average c + (g+1)/2.
    """
    _, group = values.unique(sorted=True, return_inverse=True)
    drawn = torch.zeros(len(counts), int(group.max()) + 1, dtype=counts.dtype)
    drawn.scatter_add_(1, group.expand(len(counts), -1), counts)
    mean = drawn.cumsum(dim=1) - drawn + (drawn + 1) / 2
    return mean.gather(1, group.expand(len(counts), -1))


def _correlation(x: Tensor, y: Tensor, weights: Tensor) -> Tensor:
    """Pearson's correlation with integer weights; 0 where a side is constant. All (resamples, examples)."""
    total = weights.sum(dim=1, keepdim=True)
    x = x - (weights * x).sum(dim=1, keepdim=True) / total
    y = y - (weights * y).sum(dim=1, keepdim=True) / total
    covariance = (weights * x * y).sum(dim=1)
    spread = (weights * x * x).sum(dim=1) * (weights * y * y).sum(dim=1)
    return torch.where(spread > 1e-24, covariance / spread.clamp_min(1e-24).sqrt(), torch.zeros_like(spread))
