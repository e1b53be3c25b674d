"""Which kernel multiplies a sparse map fastest is found out here: it depends on shape, sparsity, rows and machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import cast

import torch
from torch import nn

from secateur.costs.analytic import evaluation
from secateur.costs.inputs import most_tokens
from secateur.costs.timers import Timing, pass_of, sample, summarise
from secateur.edits import Sparsify
from secateur.errors import SecateurError
from secateur.hub import edits_of
from secateur.sparsity.kernels import BlockKernel, KernelName, kernel_of
from secateur.sparsity.linear import SparseLinear, drop_kernels, plain, plan_kernels
from secateur.sparsity.weights import owner_of, prunable, sparsity

ROWS = (8, 32, 128, 512, 2048)
MAP_GAIN = 0.95  # a kernel has to be so much faster than the dense product: what is left may be chance
MODEL_GAIN = 0.98  # and so much faster the model as a whole
MODEL_TOKENS = 32  # of an example, when it is measured
MODEL_SECONDS = 0.3  # for that, at each number of rows
LEAST_SPARSITY = 0.5
WORKSPACE = 1 << 28  # bytes: blocks that need more besides are not tried


@dataclass(frozen=True)
class Choice:
    """What was measured for maps of one shape and about one sparsity, and what they take.

    Attributes:
        maps: names of the weights in the base model.
        shape: (out, in).
        sparsity: of the densest of them, which was measured.
        threads: of torch.
        milliseconds: for each number of rows (examples × tokens) the median of each kernel.
        kernels: what is taken for up to so many rows: "dense", "csr" or "block".
    """

    maps: tuple[str, ...]
    shape: tuple[int, int]
    sparsity: float
    threads: int
    milliseconds: dict[int, dict[str, float]]
    kernels: dict[int, str]


def choose_kernels(model: nn.Module, rows: Iterable[int] = ROWS, *, seconds: float = 0.05) -> list[Choice]:
    """Give each sparse linear map of a model the fastest kernel for its shape, by measuring it here, in place.

    Candidates are the dense product, compressed sparse rows and, if the model is stored in blocks, the blocks that are
    there. Whatever does not clearly beat the dense product stays dense, and so does the whole model at numbers of rows
    where it is not faster with what its maps would take. Run it under `torch.inference_mode()`, with as many threads.
    What was chosen before is dropped.

    Args:
        model: a model of a known family, on the CPU in float32, opened from a sparse folder or just pruned (blocks are
            known from `sparsify(model, block=...)`). Maps other than `nn.Linear`, such as GPT-2's, stay dense.
        rows: numbers of rows (examples × tokens) to measure at; a batch gets the choice for the next larger one, and
            the dense product beyond the last.
        seconds: time for each measurement of a map.

    Returns:
        What was measured and is taken, by shape and sparsity.

    Raises:
        SecateurError: the model is not on a CPU or not in float32, or none of its maps has half its weights at zero.
    """
    counts = sorted(set(rows))
    if not counts or counts[0] < 1:
        raise SecateurError("Kernels are measured at numbers of rows (examples x tokens) from 1.")
    weights = prunable(model)
    if not all(plain(weight) for weight in weights.values()):
        raise SecateurError('Sparse kernels run on a CPU in float32: move the model, model.to("cpu", torch.float32).')
    drop_kernels(model)
    blocks = {name: edit.block for edit in edits_of(model) if isinstance(edit, Sparsify) for name in edit.kept}
    kinds: dict[tuple[object, ...], dict[str, nn.Linear]] = {}  # maps that are measured as one
    for name, weight in weights.items():
        owner, _ = owner_of(model, name)
        share = 1 - sparsity({name: weight})
        if type(owner) is nn.Linear and share <= 1 - LEAST_SPARSITY:
            kind = (weight.shape, blocks.get(name), owner.bias is None, math.floor(2 * math.log2(max(share, 1e-3))))
            kinds.setdefault(kind, {})[name] = owner
    if not kinds:
        raise SecateurError("No nn.Linear of the model's layers has half its weights at zero: prune it first (mgpp).")
    choices = []
    for maps in kinds.values():
        block = blocks.get(next(iter(maps)), (1, 1))
        choice = _measured(maps, block, counts, seconds)
        for owner in maps.values():
            plan_kernels(owner, choice.kernels, block)  # type: ignore[arg-type]  # one plan for all: the choice's own
        choices.append(choice)
    _check_model(model, [owner for maps in kinds.values() for owner in maps.values()], choices, counts)
    for maps, choice in zip(kinds.values(), choices, strict=True):
        if all(name == "dense" for name in choice.kernels.values()):
            for owner in maps.values():
                drop_kernels(owner)
    return choices


def _measured(maps: dict[str, nn.Linear], block: tuple[int, int], rows: Sequence[int], seconds: float) -> Choice:
    """Measure the densest of some maps by itself."""
    densest = min(maps.values(), key=lambda owner: sparsity({"": owner.weight}))
    weight, bias = densest.weight.detach(), densest.bias
    names: list[KernelName] = ["csr"] if block == (1, 1) else ["csr", "block"]
    built = {name: kernel_of(name, weight, block) for name in names}
    times: dict[int, dict[str, float]] = {}
    kernels: dict[int, str] = {}
    with torch.inference_mode():
        for count in rows:
            x = torch.randn(count, weight.shape[1])
            runners: dict[str, Callable[[], object]] = {"dense": partial(nn.functional.linear, x, weight, bias)}
            small = {n: k for n, k in built.items() if not isinstance(k, BlockKernel) or k.workspace(count) < WORKSPACE}
            runners |= {name: partial(kernel, x, bias) for name, kernel in small.items()}
            found = {name: median(durations) for name, durations in sample(runners, seconds, 5).items()}
            fastest = min(found, key=found.__getitem__)
            times[count], kernels[count] = found, fastest if found[fastest] < MAP_GAIN * found["dense"] else "dense"
    shape = (weight.shape[0], weight.shape[1])
    return Choice(tuple(maps), shape, sparsity({"": weight}), torch.get_num_threads(), times, kernels)


def _check_model(model: nn.Module, owners: Sequence[nn.Linear], choices: Sequence[Choice], rows: Sequence[int]) -> None:
    """Set all maps back to the dense product at numbers of rows where the model as a whole is not faster."""
    plans = [cast(SparseLinear, owner).plan for owner in owners]
    try:
        for count in rows:
            if all(choice.kernels[count] == "dense" for choice in choices):
                continue
            for owner, plan in zip(owners, plans, strict=True):
                owner.__dict__["plan"] = {math.inf: plan[count]}  # the rows of whole examples may be others
                owner.__dict__["built"] = (None, {})
            if not _faster(model, owners, count):
                for choice in choices:
                    choice.kernels[count] = "dense"
    finally:
        for owner, plan in zip(owners, plans, strict=True):
            owner.__dict__ |= {"plan": plan, "built": (None, {})}


def _faster(model: nn.Module, owners: Sequence[nn.Linear], count: int) -> bool:
    """Whether the model is clearly faster with kernels, at about so many rows; not if an example has more."""
    tokens = min(count, MODEL_TOKENS, most_tokens(model))
    seen: list[int] = []  # rows of one example: a text's tokens, an image's patches
    with evaluation(model), torch.inference_mode():
        with owners[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel())):
            pass_of(model, 1, tokens)()
        batch = count // seen[0]
        if not batch:
            return False
        found = _in_turns(owners, pass_of(model, batch, tokens), MODEL_SECONDS, 9)
    return median(found["sparse"]) <= MODEL_GAIN * median(found["dense"])


def time_kernels(
    model: nn.Module, batch: int = 1, tokens: int = 128, *, seconds: float = 4.0, min_runs: int = 10
) -> tuple[Timing, Timing]:
    """Time a model without its kernels and with them, in turns.

    The tensors are the same: copies of a model differ in speed by how they lie in memory.

    Args:
        model: a model that kernels were chosen for.
        batch: examples per pass.
        tokens: tokens per example.
        seconds: how long to measure both together, warm-up not included.
        min_runs: passes of each to measure even if that takes longer.
    """
    owners = [module for module in model.modules() if isinstance(module, SparseLinear)]
    with evaluation(model), torch.inference_mode():
        found = _in_turns(owners, pass_of(model, batch, tokens), seconds, min_runs)
    dense, sparse = (summarise(found[kind], model, batch, tokens) for kind in ("dense", "sparse"))
    return dense, sparse


def _in_turns(
    owners: Sequence[nn.Linear], step: Callable[[], object], seconds: float, min_runs: int
) -> dict[str, list[float]]:
    """Milliseconds of a pass with all maps dense, and with their kernels, which are there afterwards."""

    def run(kind: type[nn.Linear]) -> None:
        for owner in owners:
            owner.__class__ = kind
        step()

    try:
        return sample({"dense": partial(run, nn.Linear), "sparse": partial(run, SparseLinear)}, seconds, min_runs)
    finally:
        for owner in owners:
            owner.__class__ = SparseLinear
