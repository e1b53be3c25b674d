"""Which kernel multiplies a sparse map fastest is found out here: it depends on shape, sparsity, rows and machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.costs.analytic import evaluation
from secateur.costs.timers import pass_of, sample
from secateur.edits import Sparsify
from secateur.errors import SecateurError
from secateur.hub import edits_of
from secateur.runtime.kernels import Kernel, KernelName, kernel_of
from secateur.sparsity.weights import owner_of, prunable, sparsity

ROWS = (8, 32, 128, 512, 2048)
GAIN = 0.95  # a kernel has to be so much faster than the dense one: below that it may be chance
WHOLE = 0.98  # and so much faster the model as a whole
TOKENS = 32  # of an example, when it is measured
SECONDS = 0.3  # for that, at each number of rows
LEAST = 0.5  # sparsity from which skipping zeros is tried


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


class SparseLinear(nn.Linear):
    """An `nn.Linear` that multiplies by the kernel for the number of rows it gets.

    Its parameters stay dense, so that it is saved and trained like any other. With gradients, under autocast, when
    traced, or with more rows than were measured, it is an `nn.Linear`. Kernels are made anew when the weight changed.
    """

    plan: dict[int, str]
    block: tuple[int, int]
    made: tuple[object, dict[KernelName, Kernel]]

    def forward(self, input: Tensor) -> Tensor:
        """X Wᵀ + b for x of shape (..., in)."""
        name = self._name(input)
        if name is None:
            return super().forward(input)
        stamp = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if self.made[0] != stamp:
            names = cast(set[KernelName], set(self.plan.values()) - {"dense"})
            self.made = (stamp, {name: kernel_of(name, self.weight.detach(), self.block) for name in names})
        product = self.made[1][name](input.reshape(-1, self.in_features), self.bias)
        return product.view(*input.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """Copies make their own kernels: torch cannot copy sparse rows."""
        return {**self.__dict__, "made": (None, {})}

    def _name(self, x: Tensor) -> KernelName | None:
        """The kernel for this input; None for the dense product."""
        learns = torch.is_grad_enabled() and (x.requires_grad or self.weight.requires_grad)
        traced = torch.compiler.is_compiling() or torch.jit._trace.is_tracing()
        if learns or traced or torch.is_autocast_enabled(x.device.type) or not (_plain(x) and _plain(self.weight)):
            return None
        rows = x.numel() // self.in_features
        name = next((name for most, name in self.plan.items() if 0 < rows <= most), "dense")
        return None if name == "dense" else cast(KernelName, name)


def choose_kernels(model: nn.Module, rows: Sequence[int] = ROWS, *, seconds: float = 0.05) -> list[Choice]:
    """Give each sparse linear map of a model the fastest kernel for its shape, by measuring it here, in place.

    Candidates are the dense product, compressed sparse rows and, where zeros come in blocks, the blocks that are there.
    Whatever does not clearly beat the dense product stays dense, and so does the whole model at numbers of rows where
    it is not faster with what its maps would take. Run it under `torch.inference_mode()`, with as many threads.

    Args:
        model: a model of a known family, on the CPU in float32, opened from a sparse folder or just pruned.
        rows: numbers of rows (examples × tokens) to measure at; a batch gets the choice for the next larger one, and
            the dense product beyond the last.
        seconds: time for each measurement of a map.

    Returns:
        What was measured and is taken, by shape and sparsity.

    Raises:
        SecateurError: the model is not on a CPU or not in float32, or none of its maps has half its weights at zero.
    """
    if not rows or min(rows) < 1:
        raise SecateurError("Kernels are measured at numbers of rows (examples x tokens) from 1.")
    weights = prunable(model)
    if not all(_plain(weight) for weight in weights.values()):
        raise SecateurError("Sparse kernels run on a CPU in float32: move the model there, model.float().cpu().")
    blocks = {name: edit.block for edit in edits_of(model) if isinstance(edit, Sparsify) for name in edit.kept}
    alike: dict[tuple[object, ...], dict[str, nn.Linear]] = {}
    for name, weight in weights.items():
        owner, _ = owner_of(model, name)
        share = 1 - sparsity({name: weight})
        if type(owner) in (nn.Linear, SparseLinear) and share <= 1 - LEAST:
            key = (weight.shape, blocks.get(name), owner.bias is None, math.floor(2 * math.log2(max(share, 1e-3))))
            alike.setdefault(key, {})[name] = cast(nn.Linear, owner)
    if not alike:
        raise SecateurError("No linear map of the model has half its weights at zero: prune it first, with mgpp.")
    chosen = []
    for maps in alike.values():
        block = blocks.get(next(iter(maps)), (1, 1))
        choice = _measured(maps, block, sorted(rows), seconds)
        for owner in maps.values():
            owner.__class__ = SparseLinear  # hooks, names and whatever refers to it stay
            # one plan for all of them, the choice's own
            owner.__dict__ |= {"plan": choice.kernels, "block": block, "made": (None, {})}
        chosen.append(choice)
    owners = [cast(SparseLinear, owner) for maps in alike.values() for owner in maps.values()]
    _check_whole(model, owners, sorted(rows))
    return chosen


def _measured(maps: dict[str, nn.Linear], block: tuple[int, int], rows: Sequence[int], seconds: float) -> Choice:
    """Measure the densest of some maps by itself."""
    densest = min(maps.values(), key=lambda owner: sparsity({"": owner.weight}))
    weight, bias = densest.weight.detach(), densest.bias
    names: list[KernelName] = ["csr"] if block == (1, 1) else ["csr", "block"]
    made = {name: kernel_of(name, weight, block) for name in names}
    times: dict[int, dict[str, float]] = {}
    kernels: dict[int, str] = {}
    with torch.inference_mode():
        for count in rows:
            x = torch.randn(count, weight.shape[1])
            runners: dict[str, Callable[[], object]] = {"dense": partial(nn.functional.linear, x, weight, bias)}
            runners |= {name: partial(kernel, x, bias) for name, kernel in made.items()}
            found = {name: median(durations) for name, durations in sample(runners, seconds, 5).items()}
            fastest = min(found, key=found.__getitem__)
            times[count], kernels[count] = found, fastest if found[fastest] < GAIN * found["dense"] else "dense"
    shape = (weight.shape[0], weight.shape[1])
    return Choice(tuple(maps), shape, sparsity({"": weight}), torch.get_num_threads(), times, kernels)


def _check_whole(model: nn.Module, owners: Sequence[SparseLinear], rows: Sequence[int]) -> None:
    """Set maps back to the dense product, at numbers of rows where the model as a whole is not faster."""

    def take(owner_class: type[nn.Linear], step: Callable[[], object]) -> None:
        for owner in owners:
            owner.__class__ = owner_class  # type: ignore[assignment]
        step()

    with evaluation(model), torch.inference_mode():
        for count in rows:
            tokens = min(count, TOKENS)
            batch = count // _rows_of_one(model, owners[0], tokens)
            if not batch or all(owner.plan[count] == "dense" for owner in owners):
                continue
            step = pass_of(model, batch, tokens)
            runners = {"dense": partial(take, nn.Linear, step), "sparse": partial(take, SparseLinear, step)}
            found = {name: median(durations) for name, durations in sample(runners, SECONDS, 9).items()}
            if found["sparse"] > WHOLE * found["dense"]:
                for owner in owners:
                    owner.plan[count] = "dense"
    for owner in owners:
        taken = any(name != "dense" for name in owner.plan.values())
        owner.__class__ = SparseLinear if taken else nn.Linear  # type: ignore[assignment]


def _rows_of_one(model: nn.Module, owner: nn.Module, tokens: int) -> int:
    """Rows that an example makes: a text as many as it has tokens, an image what its size says."""
    seen: list[int] = []
    with owner.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].shape[:-1].numel())):
        pass_of(model, 1, tokens)()
    return seen[0]


def _plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
