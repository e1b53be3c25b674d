"""Peak memory of a sub-network's forward pass: its weights, and the most bytes of other tensors alive at a time."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from secateur.costs.analytic import LinearCost, bypassed, evaluation, size_bytes
from secateur.costs.inputs import dummy_inputs, run
from secateur.edits.bypass import Bypass
from secateur.edits.slice import Slice
from secateur.subnetwork import SubNetwork


@dataclass(frozen=True)
class PeakMemory:
    """Bytes at the peak of a forward pass of a sub-network that is cut out.

    Counted are parameters and buffers, and every tensor that an operator returns for as long as it is alive; what a
    kernel takes for itself meanwhile is not. The same numbers come out on every machine, at the same shape and with the
    same attention kernel.

    Attributes:
        model: whose sub-networks are counted.
        batch, tokens: shape of the pass.
        weights: bytes of parameters and buffers.
    """

    model: nn.Module
    batch: int
    tokens: int
    weights: LinearCost

    def of(self, sub: SubNetwork) -> float:
        """Bytes of a sub-network; one pass of a copy that is cut."""
        twin = copy.deepcopy(self.model)
        bypass = Bypass.of(twin, sub)
        Slice(sub).apply(twin)
        if bypass is not None:
            bypass.apply(twin)
        return self.weights.of(sub) + activation_bytes(twin, self.batch, self.tokens)


def peak_memory(model: nn.Module, batch: int = 1, tokens: int = 128) -> PeakMemory:
    """The peak memory of a model's sub-networks, empty blocks bypassed.

    Args:
        model: a model of a known family.
        batch: examples per pass.
        tokens: tokens per example.
    """
    return PeakMemory(model, batch, tokens, bypassed("size", size_bytes(model), model))


def activation_bytes(model: nn.Module, batch: int = 1, tokens: int = 128) -> int:
    """The most bytes alive at a time, in one forward pass, of tensors that are neither weights nor inputs."""
    inputs = dummy_inputs(model, batch, tokens)
    with evaluation(model), torch.inference_mode():
        return peak_of(lambda: run(model, inputs), (*model.parameters(), *model.buffers(), *inputs.values()))


def peak_of(compute: Callable[[], object], known: Iterable[Tensor] = ()) -> int:
    """The most bytes alive at a time of tensors that a computation makes.

    Args:
        compute: the computation.
        known: tensors whose storages are not counted, though operators may return views of them.
    """
    with _Alive(known) as alive:
        compute()
    return alive.peak


class _Alive(TorchDispatchMode):
    """Sums the storages of tensors that operators return, until they are freed."""

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.seen = weakref.WeakSet(tensor.untyped_storage() for tensor in known)
        self.now = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self.seen:
                self.seen.add(storage)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return made

    def _freed(self, size: int) -> None:
        self.now -= size
