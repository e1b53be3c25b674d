"""Zeros that cost one bit: a mask of the weights (or blocks) that are there, and their values."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from secateur.errors import InvalidModel

Values = Literal["fp32", "bf16", "int8"]
DTYPES: dict[str, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}

_BITS = torch.tensor([1, 2, 4, 8, 16, 32, 64, 128], dtype=torch.uint8)


def packed_bits(mask: Tensor) -> Tensor:
    """A boolean tensor as bytes, the first in the lowest bit: (⌈n/8⌉,) uint8."""
    flat = mask.reshape(-1)
    padded = torch.nn.functional.pad(flat.to(torch.uint8), (0, -len(flat) % 8))
    return (padded.view(-1, 8) * _BITS.to(flat.device)).sum(dim=1, dtype=torch.uint8)


def unpacked_bits(bits: Tensor, count: int) -> Tensor:
    """Inverse of `packed_bits`: (count,) bool."""
    return (bits[:, None] & _BITS.to(bits.device)).ne(0).view(-1)[:count]


def blocks_of(weight: Tensor, block: tuple[int, int]) -> Tensor:
    """(rows, columns) → (blocks, rows × columns of one), row of blocks by row of blocks."""
    rows, columns = block
    cut = weight.unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).transpose(1, 2)
    return cut.reshape(-1, rows * columns)


def from_blocks(blocks: Tensor, shape: tuple[int, int], block: tuple[int, int]) -> Tensor:
    """Inverse of `blocks_of`."""
    rows, columns = block
    grid = blocks.view(shape[0] // rows, shape[1] // columns, rows, columns)
    return grid.transpose(1, 2).reshape(shape)


def encode(weight: Tensor, values: Values, block: tuple[int, int] = (1, 1)) -> dict[str, Tensor]:
    """A matrix as the parts that are stored.

    Args:
        weight: (rows, columns), a multiple of the block each way.
        values: how values are stored. int8 has a scale for each row: w ≈ scale · q, scale = max |w| / 127.
        block: rows × columns that are there or not together.

    Returns:
        "values" (kept × block size,), "mask" (⌈blocks/8⌉,) uint8 and, for int8, "scale" (rows,) float32.
    """
    parts: dict[str, Tensor] = {}
    mask = blocks_of(weight, block).ne(0).any(dim=1)
    stored = weight
    if values == "int8":
        stored, parts["scale"] = int8_rows(weight)
    parts["values"] = blocks_of(stored, block)[mask].reshape(-1).to(DTYPES[values])
    parts["mask"] = packed_bits(mask)
    return parts


def int8_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A matrix as whole numbers from -127 to 127 and a scale for each row, w ≈ scale · q, scale = max |w| / 127.

    Scales are rounded up to 16 significant bits, so that 127 · scale is exact: what was rounded once stays as it is.
    """
    scale = weight.float().abs().amax(dim=1) / 127 if weight.numel() else weight.new_zeros(len(weight)).float()
    scale = ((scale.view(torch.int32) + 0xFF) & ~0xFF).view(torch.float32)
    return (weight.float() / torch.where(scale == 0, 1, scale)[:, None]).round().to(torch.int8), scale


def decode(parts: dict[str, Tensor], shape: tuple[int, int], dtype: torch.dtype, block: tuple[int, int]) -> Tensor:
    """Inverse of `encode`, up to the rounding of its values.

    Raises:
        InvalidModel: there are not as many values as the mask has places for.
    """
    size = block[0] * block[1]
    mask = unpacked_bits(parts["mask"], shape[0] * shape[1] // size)
    if int(mask.sum()) * size != parts["values"].numel():
        raise InvalidModel("A sparse weight has not as many values as its mask has places for: the file is damaged.")
    blocks = torch.zeros(len(mask), size, dtype=torch.float32, device=mask.device)
    blocks[mask] = parts["values"].float().view(-1, size)
    weight = from_blocks(blocks, shape, block)
    if "scale" in parts:
        weight = weight * parts["scale"].float()[:, None]
    return weight.to(dtype)
