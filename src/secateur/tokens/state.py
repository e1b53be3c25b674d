"""One forward pass with elimination: which tokens are left, what they scored, and the states of those that went."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass

import torch
from torch import Tensor

from secateur.errors import SecateurError
from secateur.tokens.layout import Layout
from secateur.tokens.scores import Weighting, column_attention, counts, smoothed

CURRENT: ContextVar[Pass | None] = ContextVar("secateur_pass", default=None)
"""The pass that this thread is in; None while tokens are not being eliminated."""


@dataclass(frozen=True)
class Selection:
    """How tokens are chosen.

    Attributes:
        weighting: "attention" is the mean attention a token gets; "value" weighs it by the size of its value vector.
        diagonal: count what a token pays to itself.
        beta: weight of the layers before in the score.
        protected: tokens at the beginning that always stay ([CLS]).
        chooser: overrides the score: given (layer, score, layout) it returns another one. For controls such as random.
    """

    weighting: Weighting = "attention"
    diagonal: bool = True
    beta: float = 0.0
    protected: int = 1
    chooser: Callable[[int, Tensor, Layout], Tensor] | None = None


class Pass:
    """The state of one forward pass.

    Args:
        real: True for real tokens, (batch, tokens).
        kept: share of the tokens that each layer hands on; None only watches, every layer scores and none eliminates.
        selection: how tokens are chosen.
        packed: whether hidden states are packed between the first layer and the last.
    """

    def __init__(self, real: Tensor, kept: tuple[float, ...] | None, selection: Selection, packed: bool) -> None:
        self.shape = tuple(real.shape)
        self.layout = Layout.of_mask(real, packed=packed)
        self.selection = selection
        self.layer = -1
        self.scoring = False
        self.seen: dict[int, Tensor] = {}
        self.watching = kept is None
        self._targets = counts(self.layout.lengths, kept, selection.protected) if kept is not None else []
        self._score: Tensor | None = None
        self.columns: Tensor | None = None
        self._before = self.layout
        self._keep = real
        self._gone: list[tuple[Tensor, Tensor]] = []

    @property
    def target(self) -> tuple[int, ...]:
        """Tokens of each example that leave the current layer."""
        return self.layout.lengths if self.watching else tuple(self._targets[self.layer])

    def enter(self, layer: int) -> None:
        """Begin a layer: it scores if it eliminates."""
        self.layer = layer
        self.columns = None
        self.scoring = self.watching or self.target != self.layout.lengths

    def score(self, probabilities: Tensor, real: Tensor, values: Tensor | None) -> Tensor:
        """Score the tokens of a padded block of attention."""
        chosen = self.selection
        weights = values if chosen.weighting == "value" else None
        return column_attention(probabilities, real, diagonal=chosen.diagonal, values=weights)

    def observe(self, score: Tensor) -> None:
        """Take the scores of the current layer, (batch, width)."""
        self._score = smoothed(score, self._score, self.selection.beta)
        if self.watching:
            self.seen[self.layer] = self._score

    def choose(self) -> None:
        """Choose the tokens that the current layer keeps, if it eliminates; `layout` moves on to them.

        `columns` then says where they are in the layout before, (batch, new width), ascending.
        """
        if not self.scoring or self.watching:
            return
        before, lengths = self.layout, self.target
        score = self._score
        if score is None:  # no layer so far has heads to score with: keep the first tokens
            score = torch.arange(0, -before.slots.shape[1], -1, device=before.slots.device).float()
            score = score.expand(before.slots.shape)
        if self.selection.chooser is not None:
            score = self.selection.chooser(self.layer, score, before)
        score = score.masked_fill(~before.valid, -torch.inf)
        score[:, : self.selection.protected] = torch.inf
        rank = score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        keep = rank < torch.tensor(lengths, device=rank.device)[:, None]
        self.layout, self.columns = before.select(keep, lengths)
        self._before, self._keep = before, keep
        if self._score is not None:
            self._score = self._score.gather(1, self.columns)

    def shorten(self, hidden: Tensor, *, aside: bool = True) -> Tensor:
        """The chosen tokens of hidden states that are in the form of the layout before.

        Args:
            hidden: (batch, width, d), or (1, Σ lengths, d) when packed.
            aside: put the states of the others aside, to be given back after the last layer.
        """
        if self.columns is None:
            return hidden
        if aside:
            gone = ~self._keep & self._before.valid
            states = hidden[0][self._before.pack(gone)] if self._before.packed else hidden[gone]
            self._gone.append((self._places(self._before, gone), states))
        if self._before.packed:
            return hidden[0].index_select(0, self._rows())[None]
        return hidden.gather(1, self.columns[..., None].expand(*self.columns.shape, hidden.shape[-1]))

    def spread(self, kept: Tensor) -> Tensor:
        """Inverse of `shorten`, with zeros for the tokens that went: for pre-norm layers."""
        if self.columns is None:
            return kept
        if self._before.packed:
            zeros = kept.new_zeros(sum(self._before.lengths), kept.shape[-1])
            return zeros.index_copy(0, self._rows(), kept[0])[None]
        zeros = kept.new_zeros(*self._before.slots.shape, kept.shape[-1])
        return zeros.scatter(1, self.columns[..., None].expand_as(kept), kept)

    def _rows(self) -> Tensor:
        """Packed rows, in the layout before, of the chosen tokens."""
        every = torch.arange(sum(self._before.lengths), device=self.layout.slots.device)
        return self.layout.pack(self._before.pad(every).gather(1, self.columns))  # type: ignore[arg-type]

    def begin(self, hidden: Tensor) -> Tensor:
        """Embeddings (batch, tokens, d) in the layout's form."""
        slots = self.layout.slots
        padded = hidden.gather(1, slots[..., None].expand(*slots.shape, hidden.shape[-1]))
        return self.layout.pack(padded)[None] if self.layout.packed else padded

    def restore(self, hidden: Tensor) -> Tensor:
        """The last layer's output as (batch, tokens, d): every token at its place with its last state, padding 0."""
        flat = hidden[0] if self.layout.packed else hidden[self.layout.valid]
        places = [self._places(self.layout, self.layout.valid), *(places for places, _ in self._gone)]
        states = [flat, *(states for _, states in self._gone)]
        batch, tokens = self.shape
        full = flat.new_zeros(batch * tokens, flat.shape[-1])
        return full.index_copy(0, torch.cat(places), torch.cat(states)).view(batch, tokens, -1)

    def _places(self, layout: Layout, which: Tensor) -> Tensor:
        """Flat places in the (batch × tokens) input of the marked columns of a layout."""
        batch = torch.arange(self.shape[0], device=layout.slots.device)[:, None]
        return (batch * self.shape[1] + layout.slots)[which]


def current() -> Pass:
    """The pass that this thread is in.

    Raises:
        SecateurError: none has begun: an attention module was called outside its model.
    """
    now = CURRENT.get()
    if now is None:
        raise SecateurError("Tokens are eliminated in a pass of the whole model: call the model, not a part of it.")
    return now
