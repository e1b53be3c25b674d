"""The verb `compress`: open, cut by a method, judge, time, record."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import hub
from secateur.costs.analytic import encoder_params, file_bytes, macs, params
from secateur.costs.budget import Budget, Constraint, constraints
from secateur.costs.latency import Timing, time_interleaved
from secateur.costs.memory import PeakMemory
from secateur.families import sites
from secateur.given import TaskLike, length_of, opened, setting_of
from secateur.methods import method_of
from secateur.optimize.allocate import allocate
from secateur.results import Result, measured
from secateur.run import Method
from secateur.starting import settings_of, start
from secateur.subnetwork import SubNetwork, UnitScores
from secateur.tasks import check_labels, load_task
from secateur.tasks.metrics import paired_bootstrap

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
    started = start(
        model,
        chosen,
        asked,
        task=task,
        out=out,
        mark="result.json",
        verb="compress",
        tokenizer=tokenizer,
        split=split,
        batch=batch,
        tokens=tokens,
        seed=seed,
        resume=resume,
        progress=progress,
    )
    job = started.job
    net, data, length, limits, run = job.model, job.task, job.tokens, job.constraints, job.run
    before = started.judged("evaluate before", net)
    outcome = chosen.run(job)
    after = started.judged("evaluate after", outcome.model)
    timings = run.timed(
        "measure", lambda: time_interleaved({"before": net, "after": outcome.model}, batch, length, seconds=seconds)
    )
    predicted = outcome.predicted or _predicted(net, batch, length, outcome.subnetwork, limits)
    record = started.record("compress")
    record["task"]["difference"] = paired_bootstrap(
        data.metric, before.logits, after.logits, before.labels, names=data.label_names or ()
    )
    result = Result(
        **record,
        name=f"{chosen.name} {asked.describe()}",
        budget=_reached(asked, limits, predicted, timings),
        before=measured(net, batch, length, before.metrics, timings["before"]),
        after=measured(outcome.model, batch, length, after.metrics, timings["after"]),
        predicted=predicted,
        latency_setting=setting_of(timings["after"]),
        seconds=run.seconds,
        edits=[edit.to_dict() for edit in hub.edits_of(outcome.model)],
        subnetwork=outcome.subnetwork.to_dict(),
        blocks={"heads": [s.name for s in sites(net).heads], "neurons": [s.name for s in sites(net).neurons]},
        scores=_scores(outcome.scores),
        model=outcome.model,
        tokenizer=job.tokenizer,
        given_bytes=hub.given_bytes(started.source),
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
        "method": settings_of(chosen),
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


def _if_alike(limits: Sequence[Constraint], full: SubNetwork, multiple: int) -> SubNetwork | None:
    """What a budget leaves if every unit of a kind matters alike; None if it limits no sum over blocks."""
    each = [limit for limit in limits if not isinstance(limit.cost, PeakMemory)]
    if not each:
        return None
    heads, neurons = full.masks()
    share = sum(map(len, heads)) / max(sum(map(len, neurons)), 1)
    return allocate(UnitScores(heads, [share * mask for mask in neurons]), each, multiple=multiple)


def _predicted(
    model: PreTrainedModel, batch: int, tokens: int, sub: SubNetwork, limits: Sequence[Constraint]
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
    asked: Budget, limits: Sequence[Constraint], predicted: dict[str, float], timings: dict[str, Timing]
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
