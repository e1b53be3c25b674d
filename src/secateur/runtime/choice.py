"""Which kernel multiplies a sparse map fastest is found out here: it depends on shape, sparsity, rows and machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.costs.timers import sample
from secateur.edits import Sparsify
from secateur.errors import SecateurError
from secateur.hub import edits_of
from secateur.runtime.kernels import Kernel, KernelName, kernel_of
from secateur.sparsity.weights import owner_of, prunable, sparsity

ROWS = (8, 32, 128, 512, 2048)
GAIN = 0.95  # a kernel has to be so much faster than the dense one: below that it may be chance
LEAST = 0.5  # sparsity from which skipping zeros is tried


@dataclass(frozen=True)
class Choice:
    """What was measured for maps of one shape and about one sparsity.

    Attributes:
        maps: names of the weights in the base model.
        shape: (out, in).
        sparsity: of the densest of them, which was measured.
        threads: of torch.
        milliseconds: for each number of rows (examples × tokens) the median of each kernel.
    """

    maps: tuple[str, ...]
    shape: tuple[int, int]
    sparsity: float
    threads: int
    milliseconds: dict[int, dict[str, float]]

    @property
    def kernels(self) -> dict[int, str]:
        """The kernel for up to so many rows: the fastest, and "dense" unless another clearly wins."""
        chosen: dict[int, str] = {}
        for rows, times in self.milliseconds.items():
            fastest = min(times, key=times.__getitem__)
            chosen[rows] = fastest if times[fastest] < GAIN * times["dense"] else "dense"
        return chosen

    def to_dict(self) -> dict[str, Any]:
        return {**asdict(self), "kernels": self.kernels}


class SparseLinear(nn.Linear):
    """An `nn.Linear` that multiplies by the kernel for the number of rows it gets.

    Its parameters stay dense, so that it is saved and trained like any other. With gradients, under autocast, when
    traced, or with more rows than were measured, it is an `nn.Linear`. Kernels are made anew when the weight changed.
    """

    plan: tuple[tuple[int, KernelName | None], ...]
    block: tuple[int, int]
    made: tuple[object, dict[KernelName, Kernel]]

    def forward(self, input: Tensor) -> Tensor:
        """X Wᵀ + b for x of shape (..., in)."""
        name = self._name(input)
        if name is None:
            return super().forward(input)
        stamp = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        if self.made[0] != stamp:
            names = {name for _, name in self.plan if name}
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
        return next((name for most, name in self.plan if 0 < rows <= most), None)


def choose_kernels(model: nn.Module, rows: Sequence[int] = ROWS, *, seconds: float = 0.1) -> list[Choice]:
    """Give each sparse linear map of a model the fastest kernel for its shape, by measuring it here, in place.

    Candidates are the dense product, compressed sparse rows and, where zeros come in blocks, the blocks that are there.
    Whatever does not clearly beat the dense product stays dense. Run the model under `torch.inference_mode()`.

    Args:
        model: a model of a known family, on the CPU in float32, opened from a sparse folder or just pruned.
        rows: numbers of rows (examples × tokens) to measure at; a batch gets the choice for the next larger one, and
            the dense product beyond the last.
        seconds: time for each measurement.

    Returns:
        What was measured, by shape and sparsity.

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
    return [_choose(maps, blocks.get(next(iter(maps)), (1, 1)), sorted(rows), seconds) for maps in alike.values()]


def _choose(maps: dict[str, nn.Linear], block: tuple[int, int], rows: Sequence[int], seconds: float) -> Choice:
    """Measure the densest of some maps, and set the choice in all of them."""
    densest = min(maps.values(), key=lambda owner: sparsity({"": owner.weight}))
    weight, bias = densest.weight.detach(), densest.bias
    names: list[KernelName] = ["csr"] if block == (1, 1) else ["csr", "block"]
    made = {name: kernel_of(name, weight, block) for name in names}
    times: dict[int, dict[str, float]] = {}
    with torch.inference_mode():
        for count in rows:
            x = torch.randn(count, weight.shape[1])
            runners: dict[str, Callable[[], object]] = {"dense": partial(nn.functional.linear, x, weight, bias)}
            runners |= {name: partial(kernel, x, bias) for name, kernel in made.items()}
            times[count] = {name: median(found) for name, found in sample(runners, seconds, 5).items()}
    shape = (weight.shape[0], weight.shape[1])
    choice = Choice(tuple(maps), shape, sparsity({"": weight}), torch.get_num_threads(), times)
    for owner in maps.values():
        _set(owner, choice, block)
    return choice


def _set(owner: nn.Linear, choice: Choice, block: tuple[int, int]) -> None:
    """Make an `nn.Linear` a `SparseLinear`, or an `nn.Linear` again if it is dense everywhere: hooks and names stay."""
    plan = tuple((rows, None if name == "dense" else cast(KernelName, name)) for rows, name in choice.kernels.items())
    if any(name for _, name in plan):
        owner.__class__ = SparseLinear
        owner.__dict__ |= {"plan": plan, "block": block, "made": (None, {})}
    else:
        owner.__class__ = nn.Linear


def _plain(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32
