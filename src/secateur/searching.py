"""The verb `search`: one super-network, many sub-networks, and the front to pick from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.costs.budget import Budget
from secateur.costs.latency import time_interleaved
from secateur.errors import SecateurError
from secateur.families import sites
from secateur.front import MARK, Front, pareto_within
from secateur.given import TaskLike
from secateur.methods import METHODS, method_of
from secateur.optimize.points import Point, check_objectives
from secateur.progress import track
from secateur.prune import taken
from secateur.run import Method
from secateur.starting import Started, start
from secateur.subnetwork import SubNetwork
from secateur.tasks import Evaluation, load_task
from secateur.tasks.metrics import paired_bootstrap


def search(
    model: str | Path | PreTrainedModel,
    method: str | Method = "nas",
    *,
    task: TaskLike,
    objectives: str | Sequence[str] = ("error", "params"),
    budget: str | None = None,
    out: str | Path | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    split: str | None = None,
    batch: int = 1,
    tokens: int | None = None,
    seed: int = 0,
    resume: bool = False,
    seconds: float = 1.0,
    progress: bool = False,
) -> Front:
    """Search a fine-tuned model for sub-networks that trade error for cost.

    Args:
        model: a folder, a hub id, or a live model (left unchanged). Opened in float32.
        method: "nas", or `Nas` with its hyper-parameters.
        task: see `load_task`: data to train and search by, and rows to judge the front by.
        objectives: "error" and one or more of "macs", "params", "encoder_params", "size", "latency", "memory"; in
            one text with commas, or a list.
        budget: limits that the front keeps, such as "latency<=10ms"; None for none.
        out: folder to write super-network, `front.json` and `report.html` to; None writes nothing.
        tokenizer: the model's tokenizer; read from the model's folder if None.
        split: rows to judge the front by; validation if the task has it and the search did not see it, else test. The
            page says so if only rows that the search chose by are left.
        batch: examples per pass at which MACs and latency count.
        tokens: tokens per example; the task's median real length if None.
        seed: of every random choice.
        resume: go on with a run that was killed; needs `out`, whose stages are kept in `<out>.run` until the end.
        seconds: how long to time each point of the front, in turns with the model as given, if latency is asked for.
        progress: show progress on standard error.

    Returns:
        The front; `Front.save` writes it.

    Raises:
        SecateurError: a subclass that says what is wrong with the model, the data, the objectives or the budget.
    """
    chosen = method_of(method)
    if not hasattr(chosen, "search"):
        able = ", ".join(name for name, cls in METHODS.items() if hasattr(cls, "search"))
        raise SecateurError(f"{chosen.name} makes one model, not a front: search with {able}.")
    wanted = check_objectives(objectives.replace(" ", "").split(",") if isinstance(objectives, str) else objectives)
    asked = Budget.parse(budget) if budget is not None else None
    data = load_task(task, seed=seed)
    if split is None and not getattr(chosen, "holdout", 0) and "test" in data.splits():
        split = "test"
    started = start(
        model,
        chosen,
        asked,
        task=data,
        out=out,
        mark=MARK,
        verb="search",
        identity={"objectives": list(wanted)},
        loose=True,
        tokenizer=tokenizer,
        split=split,
        batch=batch,
        tokens=tokens,
        seed=seed,
        resume=resume,
        progress=progress,
    )
    job = started.job
    before = started.judged("evaluate before", job.model)
    found = chosen.search(job, wanted)
    limits = {limit.kind: limit.limit for limit in job.constraints}
    timed = "latency" in (*wanted, *limits)
    judged = {}
    for point in track(pareto_within(found.points, wanted, limits), "judging the front", show=progress):
        twin = taken(found.model, point, found.weights)
        judged[point.number] = _judged(started, twin, point, before, seconds if timed else None)
    record = started.record("search")
    record["task"]["searched"] = not getattr(chosen, "holdout", 0) and started.rows == "validation"
    full = SubNetwork.full(job.model)
    front = Front(
        **record,
        name=f"{chosen.name} {', '.join(wanted)}",
        objectives=wanted,
        budget=asked.describe() if asked else None,
        limits=limits,
        dense={"costs": {kind: cost.of(full) for kind, cost in found.costs.items()}, "metrics": before.metrics},
        points=found.points,
        judged=judged,
        setting={
            "batch": job.batch,
            "tokens": job.tokens,
            "threads": torch.get_num_threads(),
            "dtype": str(job.model.dtype).removeprefix("torch."),
        },
        blocks={
            "heads": [s.name for s in sites(job.model).heads],
            "neurons": [s.name for s in sites(job.model).neurons],
        },
        seconds=job.run.seconds,
        model=found.model,
        tokenizer=job.tokenizer,
        weights=found.weights,
    )
    if out is not None:
        front.save(out)
    job.run.close()
    return front


def _judged(
    started: Started, model: PreTrainedModel, point: Point, before: Evaluation, seconds: float | None
) -> dict[str, Any]:
    """A point of the front on the rows to judge by, and by the clock."""
    data, job = started.job.task, started.job
    after = started.judged(f"point {point.number}", model, part_of="judge")
    difference = paired_bootstrap(data.metric, before.logits, after.logits, before.labels, names=data.label_names or ())
    found: dict[str, Any] = {"metrics": after.metrics, "difference": list(difference)}
    if seconds is not None:
        models = {"before": job.model, "after": model}
        timings = job.run.timed(
            f"time {point.number}",
            lambda: time_interleaved(models, job.batch, job.tokens, seconds=seconds),
            part_of="time",
        )
        found["latency_ms"] = {name: getattr(timings["after"], name) for name in ("median", "p90", "n")}
        found["speed"] = timings["before"].median / timings["after"].median
    return found
