"""The verb `compress`: open, cut by a method, judge, time, record."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import hub
from secateur.bits.modules import is_binary
from secateur.costs.analytic import encoder_params, file_bytes, macs, params
from secateur.costs.budget import Budget, Constraint, constraints
from secateur.costs.latency import Timing, time_interleaved
from secateur.costs.machine import fingerprint as machine_fingerprint
from secateur.edits import BINARY
from secateur.edits.tokens import at_rest
from secateur.errors import SecateurError
from secateur.families import sites
from secateur.given import TaskLike, judged_by, length_of, opened, setting_of
from secateur.methods import Bit, method_of
from secateur.results import Result, measured, versions, vocabulary_digest, weights_digest
from secateur.run import Job, Method, Run
from secateur.search.allocate import allocate
from secateur.subnetwork import SubNetwork, UnitScores
from secateur.tasks import Evaluation, Task, check_labels, load_task
from secateur.tasks import evaluate as evaluate_model
from secateur.tasks import fingerprint as data_fingerprint
from secateur.tasks.metrics import compute, paired_bootstrap

COUNTED = {"size": "bytes", "latency": "latency_ms"}
"""Names in `predicted` of the kinds of budget, where they differ."""


def compress(
    model: str | Path | PreTrainedModel,
    method: str | Method = "optin",
    *,
    task: TaskLike,
    budget: str | None = None,
    out: str | Path | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    split: str | None = None,
    batch: int = 1,
    tokens: int | None = None,
    seed: int = 0,
    resume: bool = False,
    seconds: float = 4.0,
    progress: bool = False,
) -> Result:
    """Cut a fine-tuned model to a budget.

    Args:
        model: a folder, a hub id, or a live model (left unchanged). Opened in float32.
        method: a name of `secateur.methods.METHODS`, or a method with its hyper-parameters.
        task: see `load_task`: data to calibrate on and to judge by.
        budget: see `Budget.parse`, such as "macs<=60%" or "latency<=12ms,size<=20MB"; the method's usual one if None.
        out: folder to write model, card, `result.json` and `report.html` to; None writes nothing.
        tokenizer: the model's tokenizer; read from the model's folder if None.
        split: rows to judge by; validation if the task has it, else test.
        batch: examples per pass at which MACs and latency count.
        tokens: tokens per example; the task's median real length if None.
        seed: of every random choice.
        resume: go on with a run that was killed; needs `out`, whose stages are kept in `<out>.run` until the end.
        seconds: how long to time the two models, in turns.
        progress: show progress on standard error.

    Returns:
        The compressed model with its record; `Result.save` writes both.

    Raises:
        SecateurError: a subclass that says what is wrong with the model, the data or the budget.
    """
    chosen = method_of(method)
    asked = Budget.parse(chosen.usual_budget if budget is None else budget)
    asked.check_kinds(chosen.budgets, chosen.name)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise SecateurError(
            "compress runs in one process: for several use CompressionTrainer, with what the method puts into it, in a "
            "training of your own."
        )
    if resume and out is None:
        raise SecateurError("Resuming needs the folder of the run that was killed: give out=.")
    if out is not None:
        hub.check_target(out, "result.json", "" if isinstance(model, PreTrainedModel) else str(model))
    data = load_task(task, seed=seed)
    source, net, words = opened(model, tokenizer, data)
    net = at_rest(net)
    if is_binary(net) and not isinstance(chosen, Bit):
        raise SecateurError(BINARY)
    data = check_labels(data, net)
    rows = judged_by(data, split)
    length = length_of(data, net, words, tokens)
    identity = {
        "model": weights_digest(net),
        "task": [data_fingerprint(data), data.kind, list(data.metrics)],
        "tokenizer": vocabulary_digest(words),
        "method": _settings(chosen),
        "budget": asked.describe(),
        "setting": [batch, length, seed, rows, torch.get_num_threads(), str(net.device), str(net.dtype)],
        "versions": versions(),
    }
    run = Run(_run_folder(out), identity, resume=resume)
    limits = _limits(run, asked, net, batch, length, chosen.cuts_units)
    job = Job(net, words, data, limits, run, batch, length, seed, progress)
    before = _judged(run, "evaluate before", net, words, data, rows, progress)
    outcome = chosen.run(job)
    after = _judged(run, "evaluate after", outcome.model, words, data, rows, progress)
    timings = run.timed(
        "measure", lambda: time_interleaved({"before": net, "after": outcome.model}, batch, length, seconds=seconds)
    )
    predicted = outcome.predicted or _predicted(net, batch, length, outcome.subnetwork, limits)
    result = Result(
        name=f"{chosen.name} {asked.describe()}",
        source=source,
        task={
            "name": data.name,
            "kind": data.kind,
            "metric": data.metric,
            "split": rows,
            "examples": len(data.split(rows)),
            "difference": paired_bootstrap(
                data.metric, before.logits, after.logits, before.labels, names=data.label_names or ()
            ),
        },
        method=_settings(chosen),
        budget=_reached(asked, limits, predicted, timings),
        before=measured(net, batch, length, before.metrics, timings["before"]),
        after=measured(outcome.model, batch, length, after.metrics, timings["after"]),
        predicted=predicted,
        latency_setting=setting_of(timings["after"]),
        seconds=run.seconds,
        seed=seed,
        versions=versions(),
        machine=machine_fingerprint(),
        data={"fingerprint": data_fingerprint(data), "splits": {k: len(v) for k, v in data.splits().items()}},
        command=shlex.join(["secateur", *sys.argv[1:]])
        if Path(sys.argv[0]).name == "secateur"
        else "secateur.compress",
        edits=[edit.to_dict() for edit in hub.edits_of(outcome.model)],
        subnetwork=outcome.subnetwork.to_dict(),
        blocks={"heads": [s.name for s in sites(net).heads], "neurons": [s.name for s in sites(net).neurons]},
        scores=_scores(outcome.scores),
        model=outcome.model,
        tokenizer=words,
        given_bytes=hub.given_bytes(source),
    )
    if out is not None:
        result.save(out)
    run.close()
    return result


def plan(
    model: str | Path | PreTrainedModel,
    method: str | Method = "optin",
    *,
    task: TaskLike,
    budget: str | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    batch: int = 1,
    tokens: int | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """What `compress` would work towards, without doing it: limits, and the widths if all units mattered alike.

    Args: as `compress`.

    Returns:
        `limits` (kind, limit, before, predicted), `heads` and `neurons` kept per block if every unit had the same
        score (None for methods that cut neither), and the setting.
    """
    chosen = method_of(method)
    asked = Budget.parse(chosen.usual_budget if budget is None else budget)
    asked.check_kinds(chosen.budgets, chosen.name)
    data = load_task(task, seed=seed)
    source, net, words = opened(model, tokenizer, data)
    data = check_labels(data, net)
    length = length_of(data, net, words, tokens)
    limits = constraints(asked, net, batch, length, units=chosen.cuts_units)
    full = SubNetwork.full(net)
    sub = _if_alike(limits, full, getattr(chosen, "multiple", 1)) if chosen.cuts_units else None
    return {
        "model": source,
        "method": _settings(chosen),
        "limits": [
            {"kind": c.kind, "limit": c.limit, "before": c.cost.of(full)}
            | ({"predicted": c.cost.of(sub)} if sub else {})
            for c in limits
        ],
        "heads": list(sub.head_widths) if sub else None,
        "neurons": list(sub.neuron_widths) if sub else None,
        "setting": {"batch": batch, "tokens": length, "training_rows": len(data.train or ())}
        | (chosen.check(net, limits, len(data.train or ())) if hasattr(chosen, "check") else {}),
    }


def _if_alike(limits: list[Constraint], full: SubNetwork, multiple: int) -> SubNetwork:
    """What a budget leaves if every unit of a kind matters alike."""
    heads, neurons = full.masks()
    share = sum(map(len, heads)) / max(sum(map(len, neurons)), 1)
    return allocate(UnitScores(heads, [share * mask for mask in neurons]), limits, multiple=multiple)


def _run_folder(out: str | Path | None) -> Path | None:
    """Where the stages of the run that writes `out` are kept: beside it."""
    return None if out is None else Path(out).resolve().with_name(f"{Path(out).resolve().name}.run")


def _limits(run: Run, asked: Budget, model: PreTrainedModel, batch: int, tokens: int, units: bool) -> list[Constraint]:
    """The budget resolved on this model; limits in milliseconds are kept, since they are measured."""
    limits = constraints(asked, model, batch, tokens, units=units)
    kept: list[float] = run.record("limits", lambda: [constraint.limit for constraint in limits])
    return [replace(constraint, limit=limit) for constraint, limit in zip(limits, kept, strict=True)]


def _settings(method: Method) -> dict[str, Any]:
    return {"name": method.name, **asdict(method)}  # type: ignore[call-overload]


def _judged(
    run: Run,
    stage: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: Task,
    split: str,
    progress: bool,
) -> Evaluation:
    def outputs() -> dict[str, torch.Tensor]:
        found = evaluate_model(model, tokenizer, data, split, progress=progress)
        return {"logits": found.logits, "labels": found.labels}

    kept = run.tensors(stage, outputs)
    return Evaluation(compute(data, kept["logits"], kept["labels"]), kept["logits"], kept["labels"])


def _predicted(
    model: PreTrainedModel, batch: int, tokens: int, sub: SubNetwork, limits: list[Constraint]
) -> dict[str, float]:
    found = {
        "macs": macs(model, batch, tokens).of(sub),
        "params": params(model).of(sub),
        "encoder_params": encoder_params(model).of(sub),
        "bytes": file_bytes(model).of(sub),
    }
    tables = [c.cost.of(sub) for c in limits if c.kind == "latency"]
    return found | ({"latency_ms": tables[0]} if tables else {})


def _reached(
    asked: Budget, limits: list[Constraint], predicted: dict[str, float], timings: dict[str, Timing]
) -> dict[str, Any]:
    """The budget as asked and as reached: counted, or timed beside the model as given."""
    terms = []
    for term, constraint in zip(asked.terms, limits, strict=True):
        limit, reached = constraint.limit, predicted.get(COUNTED.get(term.counts, term.counts), 0.0)
        met = reached <= limit
        if constraint.kind == "latency":
            limit, reached = term.limit(timings["before"].median), timings["after"].median
            met = reached <= limit
        if constraint.kind == "speedup":
            limit, reached = term.value, term.value * limit / reached
        if constraint.kind == "sparsity":
            limit, reached = term.share, 1 - reached * (1 - term.share) / limit
        terms.append(
            {
                "kind": constraint.kind,
                "asked": f"{term.value:g}{term.unit}",
                "limit": limit,
                "reached": reached,
                "met": met,
            }
        )
    return {"text": asked.describe(), "terms": terms}


def _scores(scores: UnitScores | None) -> dict[str, list[list[float]]]:
    return {} if scores is None else {"heads": _lists(scores.heads), "neurons": _lists(scores.neurons)}


def _lists(tensors: list[torch.Tensor]) -> list[list[float]]:
    return [[float(f"{value:.6g}") for value in tensor.tolist()] for tensor in tensors]
