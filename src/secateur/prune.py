"""From unit scores to a cut model: search, rearrangement, tuning, slice, and a check of measured latency."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal, get_args

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import hub
from secateur.costs.latency import time_interleaved
from secateur.edits import Bypass, Edit, Slice, apply_edits
from secateur.errors import InvalidBudget, SecateurError
from secateur.families import sites
from secateur.optimize.allocate import allocate
from secateur.optimize.points import Point
from secateur.repair import fold_scales
from secateur.repair import rearrange as rearranged
from secateur.repair import tune as tuned
from secateur.run import Job, Outcome
from secateur.scores.trajectory import UnitGradients
from secateur.subnetwork import SubNetwork, UnitScores

Tune = Literal["none", "scale", "full"]
Weights = Path | dict[str, Tensor]
"""A model's tensors by name, or the safetensors file that they are in."""
ATTEMPTS = 4  # how often a missed latency budget is tightened
MARGIN = 0.98  # aim a little below a latency that was missed


def prune(
    job: Job,
    scores: UnitScores,
    *,
    gradients: UnitGradients | None = None,
    tune: Tune = "none",
    multiple: int = 64,
    head_rate: float = 1.0,
    calibration: Callable[[], list[dict[str, Tensor]]] | None = None,
) -> Outcome:
    """Cut `job.model` to its budget, keeping the units with the highest total score.

    Args:
        job: model, budget, run folder.
        scores: importance of every unit.
        gradients: sampled directions of the units, for rearrangement; None leaves the search's choice.
        tune: how the kept units make up for the removed ones (`repair`).
        multiple: neurons per layer are kept in multiples of this many.
        head_rate: factor on head scores.
        calibration: gives the batches for tuning; labels are ignored.

    Returns:
        A new, sliced model; `job.model` is left as it was.
    """
    found = job.run.record("search", lambda: search(job, scores, multiple=multiple, head_rate=head_rate).to_dict())
    sub = SubNetwork.from_dict(found)
    if gradients is not None:
        chosen = gradients
        sub = SubNetwork.from_dict(job.run.record("rearrange", lambda: rearranged(sub, chosen).to_dict()))
    model = copy.deepcopy(job.model)
    if tune != "none":
        if calibration is None:
            raise SecateurError("Tuning needs calibration batches.")
        kept, how, batches = sub, tune, calibration

        def projections() -> dict[str, Tensor]:
            twin = copy.deepcopy(job.model)
            fold_scales(twin, tuned(job.model, kept, batches(), mode=how, progress=job.show))
            return {name: parameter.detach() for name, parameter in _projections(twin).items()}

        solved = job.run.tensors("tune", projections)
        with torch.no_grad():
            for name, parameter in _projections(model).items():
                parameter.copy_(solved[name])
    edits: list[Edit] = [Slice(sub)]
    apply_edits(model, edits)
    hub.attach(model, edits)
    return Outcome(model.eval(), edits, sub, scores)


def cut_out(model: PreTrainedModel, sub: SubNetwork) -> list[Edit]:
    """Cut a sub-network out of a super-network, in place; blocks that lose all units become the identity."""
    bypass = Bypass.of(model, sub)
    edits: list[Edit] = [Slice(sub), *([bypass] if bypass else [])]
    apply_edits(model, edits)
    hub.attach(model.eval(), edits)
    return edits


def taken(model: PreTrainedModel, point: Point, weights: Mapping[int, Weights]) -> PreTrainedModel:
    """A point cut out of a copy of its super-network, with weights of its own if it was trained by itself.

    Raises:
        SecateurError: points were trained by themselves, and the weights of this one were not kept.
    """
    if weights and point.number not in weights:
        on = ", ".join(map(str, weights))
        raise SecateurError(
            f"Point {point.number} was trained by itself, and only weights of the front were kept: take one of {on}."
        )
    found = copy.deepcopy(model)
    cut_out(found, point.sub)
    if weights:
        own = weights[point.number]
        found.load_state_dict(load_file(own) if isinstance(own, Path) else own)
    return found


def _projections(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of every output projection, which is all that tuning changes."""
    return {f"{site.name}.{name}": p for site in sites(model) for name, p in site.output.named_parameters()}


def search(job: Job, scores: UnitScores, *, multiple: int, head_rate: float) -> SubNetwork:
    """The best sub-network under the budget, checked by the clock.

    A table predicts latency, the timer judges it: at most `ATTEMPTS` times a missed limit is lowered by
    the share of the miss.
    """
    limits = list(job.constraints)
    sub = allocate(scores, limits, multiple=multiple, head_rate=head_rate)
    if not any(c.kind == "latency" for c in job.constraints):
        return sub
    best = (float("inf"), sub)
    for _ in range(ATTEMPTS):
        miss = _miss(job, sub)
        best = min(best, (miss, sub), key=lambda pair: pair[0])
        if miss <= 1:
            break
        limits = [replace(c, limit=c.limit / miss * MARGIN) if c.kind == "latency" else c for c in limits]
        try:
            sub = allocate(scores, limits, multiple=multiple, head_rate=head_rate)
        except InvalidBudget:  # nothing is left to give: the fastest one so far is what there is
            break
    return best[1]


def _miss(job: Job, sub: SubNetwork) -> float:
    """Measured over allowed latency of a cut; a share is one of the model as given, timed in the same moment."""
    trial = apply_edits(copy.deepcopy(job.model), [Slice(sub)])
    timings = time_interleaved({"full": job.model, "cut": trial}, job.batch, job.tokens)
    limits = [
        c.term.limit(timings["full"].median) if c.term is not None else c.limit
        for c in job.constraints
        if c.kind == "latency"
    ]
    return max(timings["cut"].median / limit for limit in limits)


def tune_mode(tune: Tune | bool, best: Tune) -> Tune:
    """The mode of tuning: True stands for the method's best, False for none.

    Raises:
        SecateurError: an unknown mode.
    """
    if isinstance(tune, bool):
        return best if tune else "none"
    if tune not in get_args(Tune):
        raise SecateurError(f"tune is one of {', '.join(get_args(Tune))}, true or false, not '{tune}'.")
    return tune


def pack_units(name: str, heads: list[Tensor], neurons: list[Tensor]) -> dict[str, Tensor]:
    """Per-block tensors under the names `<name>.heads.<i>` and `<name>.neurons.<i>`."""
    packed = {f"{name}.heads.{i}": tensor for i, tensor in enumerate(heads)}
    return packed | {f"{name}.neurons.{i}": tensor for i, tensor in enumerate(neurons)}


def unpack_units(name: str, packed: dict[str, Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Inverse of `pack_units`."""

    def blocks(kind: str) -> list[Tensor]:
        prefix = f"{name}.{kind}."
        count = sum(key.startswith(prefix) for key in packed)
        return [packed[f"{prefix}{i}"] for i in range(count)]

    return blocks("heads"), blocks("neurons")
