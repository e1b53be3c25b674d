"""Linear maps that skip zeros, in torch alone. `nn.functional.linear` is the twin that each must agree with."""

from __future__ import annotations

import warnings
from typing import Literal, Protocol

import torch
from torch import Tensor

from secateur.sparsity.storage import blocks_of

KernelName = Literal["csr", "block"]


class Kernel(Protocol):
    """Multiplies by a weight W of shape (out, in) that was given when it was made."""

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """X Wᵀ + b for x of shape (rows, in), without gradients: a new contiguous tensor of shape (rows, out)."""
        ...


class CsrKernel:
    """Compressed sparse rows: each weight that is not zero costs one multiplication and one index."""

    def __init__(self, weight: Tensor) -> None:
        with warnings.catch_warnings():  # "Sparse CSR tensor support is in beta state"
            warnings.simplefilter("ignore", UserWarning)
            rows = weight.detach().to_sparse_csr()
            starts, columns = rows.crow_indices().int(), rows.col_indices().int()  # longer ones are converted each time
            self.weight = torch.sparse_csr_tensor(starts, columns, rows.values(), size=rows.shape)

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return _finished(self.weight @ x.t().contiguous(), bias)


class BlockKernel:
    """The blocks that are not zero, as a batch of small dense matrices.

    Args:
        weight: (out, in).
        block: rows × columns of a block.
    """

    def __init__(self, weight: Tensor, block: tuple[int, int]) -> None:
        rows, columns = block
        blocks = blocks_of(weight.detach(), block)  # block-row by block-row
        there = blocks.ne(0).any(dim=1).nonzero().squeeze(1)
        across = weight.shape[1] // columns
        self.values = blocks[there].reshape(-1, rows, columns)
        self.source, self.target = there % across, there // across
        self.inputs, self.outputs = across, weight.shape[0] // rows

    def workspace(self, rows: int) -> int:
        """Bytes that it needs besides, for so many rows of input."""
        blocks, high, wide = self.values.shape
        return blocks * (high + wide) * rows * self.values.element_size()

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        parts = x.t().reshape(self.inputs, -1, len(x))[self.source]
        out = x.new_zeros(self.outputs, self.values.shape[1], len(x))
        out.index_add_(0, self.target, torch.bmm(self.values, parts))
        return _finished(out.flatten(0, 1), bias)


def kernel_of(name: KernelName, weight: Tensor, block: tuple[int, int]) -> Kernel:
    """The kernel of a name."""
    return BlockKernel(weight, block) if name == "block" else CsrKernel(weight)


def _finished(turned: Tensor, bias: Tensor | None) -> Tensor:
    """A product of shape (out, rows) as (rows, out), with the bias: one pass over it."""
    y = turned.t()
    return y.contiguous() if bias is None else torch.add(y, bias, out=y.new_empty(y.shape))
