"""Tasks: data with its columns, labels and metrics; batches; evaluation."""

from __future__ import annotations

from secateur.tasks.augmenting import with_replaced_words
from secateur.tasks.batching import Batches, batches, median_tokens
from secateur.tasks.loading import load_task
from secateur.tasks.metrics import Evaluation, compute, evaluate, evaluate_batches, evaluate_together, paired_bootstrap
from secateur.tasks.presets import PRESETS
from secateur.tasks.split import held_out
from secateur.tasks.task import Task, check_labels, fingerprint

__all__ = [
    "PRESETS",
    "Batches",
    "Evaluation",
    "Task",
    "batches",
    "check_labels",
    "compute",
    "evaluate",
    "evaluate_batches",
    "evaluate_together",
    "fingerprint",
    "held_out",
    "load_task",
    "median_tokens",
    "paired_bootstrap",
    "with_replaced_words",
]
