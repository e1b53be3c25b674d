"""The verbs: compress, search, measure, evaluate, export, finetune, and the plan of a compression."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.comparing import compare_engines
from secateur.composing import run_recipe
from secateur.compressing import compress, plan
from secateur.costs.analytic import macs
from secateur.costs.dial import time_settings
from secateur.costs.latency import time_model
from secateur.costs.machine import fingerprint as machine_fingerprint
from secateur.costs.tokens import FASTEST
from secateur.edits.tokens import dial_of, has_dial, turned_to
from secateur.exporting import export
from secateur.given import TaskLike, judged_by, live, opened, setting_of
from secateur.report import write_dial
from secateur.results import measured, versions
from secateur.runtime.choice import ROWS, choose_kernels, time_kernels
from secateur.searching import search
from secateur.subnetwork import SubNetwork
from secateur.tasks import Evaluation, check_labels, load_task
from secateur.tasks import evaluate as evaluate_model
from secateur.train import finetune

__all__ = [
    "compare_engines",
    "compress",
    "dial",
    "evaluate",
    "export",
    "finetune",
    "measure",
    "plan",
    "run_recipe",
    "search",
]

SPEEDUPS = (1.0, 1.5, 2.0, 3.0, 4.0, 4.8)
"""Settings of a dial that its table shows."""


def dial(
    model: str | Path | PreTrainedModel,
    task: TaskLike | None = None,
    *,
    speedups: Sequence[float] | None = None,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    split: str | None = None,
    batch: int = 1,
    tokens: int | None = None,
    seed: int = 0,
    seconds: float = 6.0,
    progress: bool = False,
) -> dict[str, Any]:
    """The table of a dial: speed-up → setting, MACs, milliseconds here, and metric.

    Args:
        model: a folder that `late` wrote, or a live model with a dial; its setting is left as it was.
        task: see `load_task`; None leaves the metric out.
        speedups: settings to measure, for texts of `tokens` tokens; the dense model is always among them. None takes
            those of `SPEEDUPS` that the model reaches.
        tokenizer: the model's tokenizer; read from the model's folder if None.
        split: rows to judge by; validation if the task has it, else test.
        batch: examples per pass, for MACs and milliseconds.
        tokens: tokens per example; the dial's own length if None.
        seed: of the split of data that has none.
        seconds: how long to time all settings, in turns.
        progress: show progress on standard error.

    Returns:
        `rows` with `speedup` (asked), `theory` (reached, by MACs of the layers), `alpha`, `macs`, `latency_ms`,
        `measured` (dense milliseconds over these) and `metrics`; the setting and the machine. Written to `dial.json`
        and `dial.html` in the model's folder, if it is one.

    Raises:
        SecateurError: the model has no dial, or a speed-up is below 1 or beyond reach.
        InvalidData: the task's labels are not the model's.
    """
    net = live(model)
    turned = dial_of(net)
    length = tokens or turned.tokens
    reach = turned.speedup_at(FASTEST, length)
    asked = [k for k in SPEEDUPS if k <= reach] if speedups is None else sorted({1.0, *speedups})
    alphas = {k: turned.alpha_for(k, length) for k in asked}
    data = check_labels(load_task(task, seed=seed), net) if task is not None else None
    timings = time_settings(net, turned, list(alphas.values()), batch, length, seconds=seconds)
    rows = []
    for (speedup, alpha), timing in zip(alphas.items(), timings, strict=True):
        row = {
            "speedup": speedup,
            "theory": turned.speedup_at(alpha, length),
            "alpha": alpha,
            "latency_ms": {"median": timing.median, "p90": timing.p90, "n": timing.n},
            "measured": timings[0].median / timing.median,
        }
        with turned.at(alpha):
            row["macs"] = round(macs(net, batch, length).of(SubNetwork.full(net)))
            if data is not None:
                row["metrics"] = evaluate(net, data, tokenizer=tokenizer, split=split, progress=progress).metrics
        rows.append(row)
    table = {"rows": rows, "setting": setting_of(timings[0]), "machine": machine_fingerprint(), "versions": versions()}
    if isinstance(model, (str, Path)) and Path(model).is_dir():
        write_dial(table, Path(model))
    return table


def measure(
    model: str | Path | PreTrainedModel,
    *,
    batch: int = 1,
    tokens: int | None = None,
    seconds: float = 4.0,
    speedup: float | None = None,
    kernels: bool = False,
) -> dict[str, Any]:
    """Count and time a model.

    Args:
        model: a folder, a hub id, or a live model.
        batch: examples per pass.
        tokens: tokens per example; None takes the length of the model's dial, or 128.
        seconds: how long to time.
        speedup: where to turn the model's dial for it; None leaves it where it stands.
        kernels: time it with sparse kernels too, in turns (`choose_kernels`).

    Returns:
        MACs, parameters, bytes, latency in milliseconds, the setting and the machine; with `kernels`, under that name,
        the latency with them, its `ratio` to that without, and the `choices`.

    Raises:
        SecateurError: `kernels` of a model without zeros.
    """
    net = live(model)
    turned = dial_of(net) if has_dial(net) else None
    length = tokens or (turned.tokens if turned else 128)
    with turned_to(net, speedup, length):
        if kernels:
            fast = copy.deepcopy(net)
            choices = choose_kernels(fast, {*ROWS, batch * length})
            timing, with_kernels = time_kernels(fast, batch, length, seconds=seconds)
        else:
            timing = time_model(net, batch, length, seconds=seconds)
        counted = asdict(measured(net, batch, length, {}, timing))
        if kernels:
            counted["kernels"] = {
                "latency_ms": {name: getattr(with_kernels, name) for name in ("median", "p90", "n")},
                "ratio": with_kernels.median / timing.median,
                "choices": [asdict(choice) for choice in choices],
            }
        if turned:
            counted["speedup"] = turned.speedup_at(turned.alpha, length)
    counted.pop("metrics")
    return {**counted, "setting": setting_of(timing), "machine": machine_fingerprint()}


def evaluate(
    model: str | Path | PreTrainedModel,
    task: TaskLike,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    split: str | None = None,
    seed: int = 0,
    progress: bool = False,
    speedup: float | None = None,
) -> Evaluation:
    """Judge a model on a task.

    Args:
        model: a folder, a hub id, or a live model.
        task: see `load_task`.
        tokenizer: the model's tokenizer; read from the model's folder if None.
        split: validation if the task has it, else test.
        seed: of the split of data that has none.
        progress: show progress on standard error.
        speedup: where to turn the model's dial for it; None leaves it where it stands.
    """
    data = load_task(task, seed=seed)
    _, net, words = opened(model, tokenizer, data)
    with turned_to(net, speedup):
        return evaluate_model(net, words, data, judged_by(data, split), progress=progress)
