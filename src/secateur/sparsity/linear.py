"""A linear map that multiplies by the kernel that was chosen for it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from secateur.sparsity.kernels import Kernel, KernelName, kernel_of


class SparseLinear(nn.Linear):
    """An `nn.Linear` that multiplies by the kernel for the number of rows it gets.

    Its parameters stay dense, so that it is saved and trained like any other. While gradients are on, under autocast,
    when traced, or with more rows than were measured, it is an `nn.Linear`. Kernels are built anew after the weight
    changed or gradients were on; a write through `weight.data` alone, or to a weight that was made under
    `torch.inference_mode()`, is not seen. With another number of threads than was measured it is an `nn.Linear` too.
    """

    plan: dict[float, str]
    block: tuple[int, int]
    planned_shape: tuple[int, ...]
    threads: int
    built: tuple[object, dict[KernelName, Kernel]]

    def forward(self, input: Tensor) -> Tensor:
        """X Wᵀ + b for x of shape (..., in)."""
        name = self.kernel_for(input)
        if name is None:
            return nn.functional.linear(input, self.weight, self.bias)
        stamp = (self.weight.data_ptr(), 0 if self.weight.is_inference() else self.weight._version)
        built = self.built
        if built[0] != stamp:
            names = cast(set[KernelName], set(self.plan.values()) - {"dense"})
            built = stamp, {name: kernel_of(name, self.weight.detach(), self.block) for name in names}
            self.built = built
        product = built[1][name](input.reshape(-1, self.in_features), self.bias)
        return product.view(*input.shape[:-1], self.out_features)

    def __getstate__(self) -> dict[str, Any]:
        """Copies build their own kernels: torch cannot copy sparse rows."""
        return {**self.__dict__, "built": (None, {})}

    def kernel_for(self, x: Tensor) -> KernelName | None:
        """The kernel for this input; None for the dense product."""
        if torch.is_grad_enabled():
            if self.built[0] is not None:  # a fused optimiser changes weights without a trace
                self.built = (None, {})
            return None
        rows = x.numel() // self.in_features
        chosen = "dense"
        for most, name in self.plan.items():  # the cheap question first: this runs in every map of every pass
            if rows <= most:
                chosen = name
                break
        if chosen == "dense" or rows == 0 or not (plain(x) and plain(self.weight)):
            return None
        traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined]
        if traced or torch.is_autocast_enabled("cpu") or self.weight.shape != self.planned_shape:
            return None
        if torch.get_num_threads() != self.threads:
            return None
        return cast(KernelName, chosen)


def plan_kernels(linear: nn.Linear, plan: dict[float, str], block: tuple[int, int]) -> None:
    """Turn an `nn.Linear` into a `SparseLinear`, in place: hooks, names and whatever refers to it stay.

    Args:
        linear: the map.
        plan: up to so many rows, "dense", "csr" or "block"; by rising rows.
        block: rows × columns of its blocks.
    """
    linear.__class__ = SparseLinear
    shape, threads = tuple(linear.weight.shape), torch.get_num_threads()
    linear.__dict__ |= {"plan": plan, "block": block, "planned_shape": shape, "threads": threads, "built": (None, {})}


def drop_kernels(model: nn.Module) -> None:
    """Turn every `SparseLinear` of a model back into an `nn.Linear`, in place."""
    for module in model.modules():
        if isinstance(module, SparseLinear):
            module.__class__ = nn.Linear  # type: ignore[assignment]
            for key in ("plan", "block", "planned_shape", "threads", "built"):
                del module.__dict__[key]


@contextmanager
def dense_products(model: nn.Module) -> Iterator[None]:
    """Let a model multiply densely for a while, as it would without kernels."""
    sparse = [module for module in model.modules() if isinstance(module, SparseLinear)]
    for module in sparse:
        module.__class__ = nn.Linear  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in sparse:
            module.__class__ = SparseLinear


def plain(tensor: Tensor) -> bool:
    """Whether kernels can multiply it: float32 on a CPU."""
    return tensor.is_cpu and tensor.dtype == torch.float32
