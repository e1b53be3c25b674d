"""Where the tokens of a batch are: padded rows, or packed one after the other without padding.

The one place that knows both forms. A `Layout` lists, for each example, the slots of the input that are still there;
hidden states are (batch, width, d) when padded, and (1, Σ lengths, d) when packed.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

WASTE = 1.3
"""Packed sequences are put into one attention call as long as the call computes at most this many times the scores
that are needed."""


@dataclass(frozen=True)
class Layout:
    """The tokens that are present.

    Attributes:
        slots: (batch, width) position of each token in the input, ascending; without meaning where there is none.
        lengths: tokens of each example; an example's tokens come first in its row of `slots`.
        packed: whether hidden states are packed.
    """

    slots: Tensor
    lengths: tuple[int, ...]
    packed: bool

    @classmethod
    def of_mask(cls, real: Tensor, *, packed: bool) -> Layout:
        """All real tokens of a padded batch.

        Args:
            real: True for real tokens, (batch, tokens); padding may be on either side.
            packed: the form of the hidden states.
        """
        lengths = tuple(real.sum(dim=-1).tolist())
        return cls((~real).to(torch.uint8).argsort(dim=-1, stable=True)[:, : max(lengths)], lengths, packed)

    @cached_property
    def valid(self) -> Tensor:
        """(batch, width): True where a row of `slots` holds a token."""
        lengths = torch.tensor(self.lengths, device=self.slots.device)
        return torch.arange(self.slots.shape[1], device=self.slots.device) < lengths[:, None]

    @cached_property
    def ragged(self) -> bool:
        """Whether rows have different lengths."""
        return len(set(self.lengths)) > 1

    @cached_property
    def rows(self) -> Tensor:
        """(Σ lengths,): flat positions of the tokens in a (batch × width) array, in packed order."""
        return self.valid.reshape(-1).nonzero().squeeze(-1)

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """(batch + 1,) int32: where each sequence starts in the packed form, and the total at the end."""
        return torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32, device=self.slots.device)

    def pad(self, packed: Tensor, fill: float = 0.0) -> Tensor:
        """Packed values (Σ lengths, ...) as (batch, width, ...)."""
        batch, width = self.slots.shape
        if not self.ragged:
            return packed.reshape(batch, width, *packed.shape[1:])
        padded = packed.new_full((batch * width, *packed.shape[1:]), fill)
        return padded.index_copy(0, self.rows, packed).reshape(batch, width, *packed.shape[1:])

    def pack(self, padded: Tensor) -> Tensor:
        """Padded values (batch, width, ...) as (Σ lengths, ...)."""
        flat = padded.reshape(-1, *padded.shape[2:])
        return flat.index_select(0, self.rows) if self.ragged else flat

    @cached_property
    def groups(self) -> list[Group]:
        """The packed sequences in groups of like length, each small enough in waste for one attention call."""
        order = sorted(range(len(self.lengths)), key=lambda i: -self.lengths[i])
        starts = self.cu_seqlens.tolist()
        found: list[list[int]] = []
        need = 0
        for i in order:
            n = self.lengths[i]
            longest = self.lengths[found[-1][0]] if found else 0
            if found and (len(found[-1]) + 1) * longest**2 <= WASTE * (need + n * n):
                found[-1].append(i)
                need += n * n
            else:
                found.append([i])
                need = n * n
        return [Group.of([starts[i] for i in g], [self.lengths[i] for i in g], self.slots.device) for g in found]

    @cached_property
    def from_groups(self) -> Tensor:
        """(Σ lengths,): where each row of the packed form is when the groups' tokens are put one after the other."""
        return torch.cat([group.index.index_select(0, group.rows) for group in self.groups]).argsort()

    def best(self, score: Tensor, lengths: tuple[int, ...]) -> Tensor:
        """Columns of the tokens with the highest scores, as many as `lengths` says, in ascending order.

        Args:
            score: (batch, width); ties go to the lower column.
            lengths: how many tokens of each example.

        Returns:
            (batch, new width).
        """
        width = max(lengths)
        order = score.argsort(dim=-1, descending=True, stable=True)[:, :width]
        if len(set(lengths)) == 1:
            return order.sort(dim=-1).values
        missing = torch.arange(width, device=score.device) >= torch.tensor(lengths, device=score.device)[:, None]
        last = score.shape[1] - 1
        return order.masked_fill(missing, last + 1).sort(dim=-1).values.clamp(max=last)

    def take(self, columns: Tensor, lengths: tuple[int, ...]) -> Layout:
        """The layout of the tokens in some columns, (batch, new width)."""
        return Layout(self.slots.gather(1, columns), lengths, self.packed)


@dataclass(frozen=True)
class Group:
    """Packed sequences that go through attention together.

    Attributes:
        index: (sequences × longest,) rows of the packed form; a padded place points at its sequence's first row.
        valid: (sequences, longest) True for real tokens.
        shape: (sequences, longest).
        rows: places of the real tokens in (sequences × longest).
        ragged: whether the sequences have different lengths.
    """

    index: Tensor
    valid: Tensor
    shape: tuple[int, int]
    rows: Tensor
    ragged: bool

    @classmethod
    def of(cls, starts: list[int], lengths: list[int], device: torch.device) -> Group:
        """Build the index of sequences given by their first rows and lengths, the longest first."""
        steps = torch.arange(lengths[0], device=device)
        valid = steps < torch.tensor(lengths, device=device)[:, None]
        index = torch.tensor(starts, device=device)[:, None] + torch.where(valid, steps, 0)
        rows = valid.reshape(-1).nonzero().squeeze(-1)
        return cls(index.reshape(-1), valid, (len(lengths), lengths[0]), rows, lengths[0] != lengths[-1])
