"""Training in bfloat16: where it pays, and where it loses nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


def bf16_pays() -> bool:
    """Return whether this machine multiplies in bfloat16: a GPU that does, or a CPU with AMX or AVX-512 for it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


@contextmanager
def bf16_products() -> Iterator[None]:
    """Round operands of float32 matrix products to bfloat16 within the context; results and their sums stay float32.

    Products of whole numbers up to 256, such as those of quantised operands, are as exact as before.
    """
    usual = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(usual)
