"""Signs and bits in words of 64: bit 1 is +1 (or 1), bit 0 is -1 (or 0), the first in the lowest place (spec 8.1)."""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 64


def words_for(count: int) -> int:
    """Words that hold so many bits."""
    return -(-count // WORD)


def packed(bits: Tensor) -> Tensor:
    """Bits, (..., K) bool, as words, (..., ⌈K/64⌉) int64; the last word is filled with zeros."""
    *lead, count = bits.shape
    padded = torch.nn.functional.pad(bits.to(torch.int64), (0, -count % WORD)).view(*lead, words_for(count), WORD)
    places = torch.ones(WORD, dtype=torch.int64, device=bits.device) << torch.arange(WORD, device=bits.device)
    return (padded * places).sum(dim=-1)  # no two share a bit, so that a sum is an or; the top one wraps to the sign


def unpacked(words: Tensor, count: int) -> Tensor:
    """Inverse of `packed`: (..., count) bool."""
    places = torch.arange(WORD, device=words.device)
    return ((words[..., None] >> places) & 1).bool().flatten(-2)[..., :count]
