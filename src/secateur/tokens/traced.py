"""Elimination as one graph for every batch and length: no count is read out of a tensor, so that it can be exported.

Form A of the padded layout: layer l is as wide as its share of the padded length, rounded up, and each example masks
what lies beyond its own count. Results are those of the other forms.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from secateur.tokens.layout import Layout
from secateur.tokens.state import Pass, Selection

PARTS = 1 << 20
"""Shares are taken as multiples of 1/PARTS where a width is counted, since widths are whole-number expressions."""


@dataclass(frozen=True)
class TracedLayout(Layout):
    """A padded layout whose counts are a tensor.

    Attributes:
        present: (batch, width) True where a row of `slots` holds a token.
    """

    present: Tensor

    @property
    def valid(self) -> Tensor:
        """(batch, width): True where a row of `slots` holds a token."""
        return self.present

    @property
    def ragged(self) -> bool:
        """Always: the lengths are not known."""
        return True


class TracedPass(Pass):
    """A forward pass that is being traced.

    Args:
        real: True for real tokens, (batch, tokens).
        kept: share of the tokens that each layer hands on.
        selection: how tokens are chosen.
    """

    def __init__(self, real: Tensor, kept: tuple[float, ...], selection: Selection) -> None:
        self.shape = tuple(real.shape)
        slots = torch.arange(real.shape[1], device=real.device).expand(real.shape)
        self.layout: TracedLayout = TracedLayout(slots, (), False, real)
        self.before = self.layout
        self.selection = selection
        self.layer = -1
        self.scoring = False
        self.watching = False
        self.seen = {}
        self.values = None
        self.cached = []
        self.columns = None
        self._score = None
        self._states = []
        self._kept = kept
        self._real = real.sum(dim=1)
        self._count = self._real

    def enter(self, layer: int) -> None:
        """Begin a layer: it scores if it eliminates."""
        self.layer = layer
        self.columns = None
        self.scoring = self._eliminates or self.selection.beta > 0
        if self.selection.beta == 0:
            self._score = None

    @property
    def _eliminates(self) -> bool:
        return self._kept[self.layer] < (1.0, *self._kept)[self.layer]

    def begin(self, hidden: Tensor) -> Tensor:
        """Embeddings as they are."""
        return hidden

    def choose(self) -> None:
        """Choose the tokens that the current layer keeps, if it eliminates; `layout` moves on to them."""
        if not self._eliminates:
            return
        share, before = self._kept[self.layer], self.layout
        protected, recent = self.selection.protected, self.selection.recent
        wanted = (share * self._real.double() - 1e-6).ceil().long().clamp_min(protected + recent)
        self._count = torch.minimum(self._count, wanted)
        width: Any = self.shape[1] * int(share * PARTS) // PARTS + 1  # no count of this batch is larger
        if protected + recent > 1:
            width = torch.sym_min(torch.sym_max(width, protected + recent), before.slots.shape[1])
        steps = torch.arange(before.slots.shape[1], device=before.slots.device)
        score = -steps.float().expand(before.slots.shape) if self._score is None else self._score
        stay = steps < protected
        if recent:
            stay = stay | (steps >= before.valid.sum(dim=1, keepdim=True) - recent)
        score = score.masked_fill(stay, torch.inf).masked_fill(~before.valid, -torch.inf)
        best = score.sort(dim=1, descending=True, stable=True).indices[:, :width]  # `topk` takes any of equal ones
        missing = torch.arange(width, device=best.device) >= self._count[:, None]
        ordered = best.masked_fill(missing, before.slots.shape[1]).sort(dim=1).values
        present = ordered < before.slots.shape[1]
        self.columns = torch.where(present, ordered, 0)
        self.before = before
        self.layout = TracedLayout(before.slots.gather(1, self.columns), (), False, present)
        if self._score is not None:
            self._score = self._score.gather(1, self.columns).masked_fill(~present, -torch.inf)

    def spread(self, kept: Tensor) -> Tensor:
        """Inverse of `shorten`, with zeros for the tokens that went."""
        if self.columns is None:
            return kept
        width = self.before.slots.shape[1]
        zeros = kept.new_zeros(self.shape[0], width + 1, kept.shape[-1])
        return _put(zeros, torch.where(self.layout.valid, self.columns, width), kept)[:, :width]

    def restore(self, hidden: Tensor) -> Tensor:
        """The last layer's output as (batch, tokens, d): every token at its place with its last state."""
        batch, tokens = self.shape
        full = hidden.new_zeros(batch, tokens + 1, hidden.shape[-1])
        for layout, states in (*self._states, (self.layout, hidden)):
            full = _put(full, torch.where(layout.valid, layout.slots, tokens), states)
        return full[:, :tokens]


def _put(target: Tensor, places: Tensor, states: Tensor) -> Tensor:
    """States (batch, width, d) at their places (batch, width) along the second axis."""
    return target.scatter(1, places[..., None].expand(*places.shape, states.shape[-1]), states)
