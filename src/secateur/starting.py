"""How every verb that cuts begins: open, check, find the run's folder, resolve the budget; and what it records."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import hub
from secateur.bits.modules import is_binary
from secateur.costs.budget import Budget, Constraint, constraints
from secateur.costs.machine import fingerprint as machine_fingerprint
from secateur.edits import BINARY
from secateur.edits.tokens import at_rest
from secateur.errors import SecateurError
from secateur.given import TaskLike, judged_by, length_of, opened
from secateur.methods import Bit, Late
from secateur.results import versions, vocabulary_digest, weights_digest
from secateur.run import Job, Method, Run
from secateur.tasks import Evaluation, Task, check_labels, load_task
from secateur.tasks import evaluate as evaluate_model
from secateur.tasks import fingerprint as data_fingerprint
from secateur.tasks.metrics import compute


@dataclass
class Started:
    """A run that has begun.

    Attributes:
        source: where the model came from.
        job: what the method works on, its model as given.
        rows: the split to judge by.
        method: the method's settings.
    """

    source: str
    job: Job
    rows: str
    method: dict[str, Any]

    def judged(self, stage: str, model: PreTrainedModel, *, part_of: str | None = None) -> Evaluation:
        """A model on the rows to judge by; what it answers is kept as a stage of the run (see `Run.tensors`)."""
        job = self.job

        def outputs() -> dict[str, torch.Tensor]:
            found = evaluate_model(model, job.tokenizer, job.task, self.rows, progress=job.show)
            return {"logits": found.logits, "labels": found.labels}

        kept = job.run.tensors(stage, outputs, part_of=part_of)
        return Evaluation(compute(job.task, kept["logits"], kept["labels"]), kept["logits"], kept["labels"])

    def record(self, verb: str) -> dict[str, Any]:
        """What makes the run reproducible (see `described`)."""
        return described(self.source, self.job.task, self.rows, self.method, self.job.seed, verb)


def described(source: str, data: Task, rows: str, method: dict[str, Any], seed: int, verb: str) -> dict[str, Any]:
    """What makes a run reproducible, for its record.

    Args:
        source: where the model came from.
        data: the task.
        rows: the split to judge by.
        method: its name and hyper-parameters.
        seed: of every random choice.
        verb: the function of the package that was called, if the command line was not.
    """
    return {
        "source": source,
        "task": {
            "name": data.name,
            "kind": data.kind,
            "metric": data.metric,
            "split": rows,
            "examples": len(data.split(rows)),
        },
        "method": method,
        "seed": seed,
        "versions": versions(),
        "machine": machine_fingerprint(),
        "data": {"fingerprint": data_fingerprint(data), "splits": {k: len(v) for k, v in data.splits().items()}},
        "command": shlex.join(["secateur", *sys.argv[1:]])
        if Path(sys.argv[0]).name == "secateur"
        else f"secateur.{verb}",
    }


def start(
    model: str | Path | PreTrainedModel,
    method: Method,
    asked: Budget | None,
    *,
    task: TaskLike,
    out: str | Path | None,
    mark: str,
    verb: str,
    identity: dict[str, Any] | None = None,
    loose: bool = False,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    split: str | None = None,
    batch: int = 1,
    tokens: int | None = None,
    seed: int = 0,
    resume: bool = False,
    progress: bool = False,
) -> Started:
    """Open what a verb is given, refuse what cannot be done, and begin or go on with the run.

    Besides what `compress` takes: the method with its hyper-parameters, the budget (None for no limits), `mark`, a file
    that an earlier output in `out` holds, the verb for messages, `identity`, what else the run depends on, and `loose`,
    whether the model as given may meet the budget.
    """
    if asked is not None:
        asked.check_kinds(method.budgets, method.name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SecateurError(
            f"{verb} runs in one process: for several use CompressionTrainer, with what the method puts into it, in a "
            "training of your own."
        )
    if resume and out is None:
        raise SecateurError("Resuming needs the folder of the run that was killed: give out=.")
    if out is not None:
        hub.check_target(out, mark, "" if isinstance(model, PreTrainedModel) else str(model))
    data = load_task(task, seed=seed)
    source, net, words = opened(model, tokenizer, data)
    net = at_rest(net)
    if is_binary(net) and not isinstance(method, (Bit, Late)):
        raise SecateurError(BINARY)
    data = check_labels(data, net)
    rows = judged_by(data, split)
    length = length_of(data, net, words, tokens)
    settings = settings_of(method)
    depends = {
        "model": weights_digest(net),
        "task": [data_fingerprint(data), data.kind, list(data.metrics)],
        "tokenizer": vocabulary_digest(words),
        "method": settings,
        "budget": asked.describe() if asked else None,
        "setting": [batch, length, seed, rows, torch.get_num_threads(), str(net.device), str(net.dtype)],
        "versions": versions(),
        **(identity or {}),
    }
    run = Run(_run_folder(out), depends, resume=resume)
    limits = _limits(run, asked, net, batch, length, method.cuts_units, loose) if asked else []
    return Started(source, Job(net, words, data, limits, run, batch, length, seed, progress), rows, settings)


def settings_of(method: Method) -> dict[str, Any]:
    """A method's name and hyper-parameters."""
    return {"name": method.name, **asdict(method)}  # type: ignore[call-overload]


def _run_folder(out: str | Path | None) -> Path | None:
    """Where the stages of the run that writes `out` are kept: beside it."""
    return None if out is None else Path(out).resolve().with_name(f"{Path(out).resolve().name}.run")


def _limits(
    run: Run, asked: Budget, model: PreTrainedModel, batch: int, tokens: int, units: bool, loose: bool
) -> list[Constraint]:
    """The budget resolved on this model; limits in milliseconds are kept, since they are measured."""
    again = run.has("limits")  # what was within reach then is not asked of a busier clock
    limits = constraints(asked, model, batch, tokens, units=units and not again, loose=loose or again)
    kept: list[float] = run.record("limits", lambda: [constraint.limit for constraint in limits])
    return [replace(constraint, limit=limit) for constraint, limit in zip(limits, kept, strict=True)]
