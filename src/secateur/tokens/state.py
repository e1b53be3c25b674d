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
        queries: so many queries score the tokens of a long text (`scores.asking`), where attention does not write out
            those of all tokens anyway.
        protected: tokens at the beginning that always stay ([CLS], or the first of a prompt).
        recent: tokens at the end that always stay (of a prompt: the last one makes the next token).
        causal: tokens attend to themselves and what is before them.
        chooser: overrides the score: given (layer, score, layout) it returns another one. For controls such as random.
    """

    weighting: Weighting = "value"
    diagonal: bool = False
    beta: float = 0.0
    queries: int = 64
    protected: int = 1
    recent: int = 0
    causal: bool = False
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
        self.values: Tensor | None = None
        self.watching = kept is None
        self._targets = (
            counts(self.layout.lengths, kept, selection.protected + selection.recent) if kept is not None else []
        )
        self.cached: list[Tensor] = []
        self._score: Tensor | None = None
        self.columns: Tensor | None = None
        self.before = self.layout
        self._states: list[tuple[Layout, Tensor]] = []

    @property
    def target(self) -> tuple[int, ...]:
        """Tokens of each example that leave the current layer."""
        return self.layout.lengths if self.watching else tuple(self._targets[self.layer])

    def mask(self) -> Tensor | None:
        """Which keys the queries of the current layer may look at: (batch or 1, 1, queries or 1, keys)."""
        valid = self.layout.valid[:, None, None, :] if self.layout.ragged else None
        if not self.selection.causal:
            return valid
        width = self.layout.slots.shape[1]
        before = torch.ones(width, width, dtype=torch.bool, device=self.layout.slots.device).tril()[None, None]
        return before if valid is None else before & (valid | torch.eye(width, dtype=torch.bool, device=valid.device))

    @property
    def triangle(self) -> bool:
        """Whether queries see all keys up to their own and none after: what `is_causal` says to a fused kernel."""
        return self.selection.causal and not self.layout.ragged

    def enter(self, layer: int) -> None:
        """Begin a layer: it scores if it eliminates."""
        self.layer = layer
        self.columns = None
        self.cached.append(self.layout.valid)
        # whatever other examples do, an example's score comes from the same layers: its own, or all of them
        self.scoring = self.watching or self.selection.beta > 0 or self.target != self.layout.lengths
        if self.selection.beta == 0:
            self._score = None

    def score(self, probabilities: Tensor, real: Tensor, values: Tensor | None, places: Tensor | None = None) -> Tensor:
        """Score the tokens of a padded block of attention."""
        chosen = self.selection
        weights = values if chosen.weighting == "value" else None
        return column_attention(
            probabilities, real, diagonal=chosen.diagonal, values=weights, causal=chosen.causal, places=places
        )

    def observe(self, score: Tensor) -> None:
        """Take the scores of the current layer, (batch, width)."""
        self._score = smoothed(score, self._score, self.selection.beta)
        if self.watching:
            self.seen[self.layer] = self._score

    def choose(self) -> None:
        """Choose the tokens that the current layer keeps, if it eliminates; `layout` moves on to them.

        `columns` then says where they are in the layout before, (batch, new width), ascending.
        """
        if self.watching or self.target == self.layout.lengths:
            return
        before, lengths = self.layout, self.target
        score = self._score
        if score is None:  # the layer has no heads to score with: keep the first tokens
            score = torch.arange(0, -before.slots.shape[1], -1, device=before.slots.device).float()
            score = score.expand(before.slots.shape)
        if self.selection.chooser is not None:
            score = self.selection.chooser(self.layer, score, before)
        score = score.masked_fill(~before.valid, -torch.inf) if before.ragged else score.clone()
        score[:, : self.selection.protected] = torch.inf
        if self.selection.recent:
            steps = torch.arange(score.shape[1], device=score.device)
            ends = torch.tensor(before.lengths, device=score.device)[:, None]
            score = score.masked_fill((steps >= ends - self.selection.recent) & (steps < ends), torch.inf)
        self.columns = before.best(score, lengths)
        self.before, self.layout = before, before.take(self.columns, lengths)
        if self._score is not None and self.selection.beta > 0:
            self._score = self._score.gather(1, self.columns)

    def shorten(self, hidden: Tensor, *, last: bool = True) -> Tensor:
        """The chosen tokens of hidden states that are in the form of the layout before.

        Args:
            hidden: (batch, width, d), or (1, Σ lengths, d) when packed.
            last: whether these are the last states of the tokens that go, to be given back after the last layer.
        """
        if self.columns is None:
            return hidden
        if last:
            self._states.append((self.before, hidden))
        if self.before.packed:
            return hidden[0].index_select(0, self._rows(self.columns))[None]
        return hidden.gather(1, self.columns[..., None].expand(*self.columns.shape, hidden.shape[-1]))

    def spread(self, kept: Tensor) -> Tensor:
        """Inverse of `shorten`, with zeros for the tokens that went: for pre-norm layers."""
        if self.columns is None:
            return kept
        if self.before.packed:
            zeros = kept.new_zeros(sum(self.before.lengths), kept.shape[-1])
            return zeros.index_copy(0, self._rows(self.columns), kept[0])[None]
        zeros = kept.new_zeros(*self.before.slots.shape, kept.shape[-1])
        return zeros.scatter(1, self.columns[..., None].expand_as(kept), kept)

    def _rows(self, columns: Tensor) -> Tensor:
        """Packed rows, in the layout before, of the chosen tokens."""
        return self.layout.pack(self.before.cu_seqlens[:-1, None] + columns)

    def begin(self, hidden: Tensor) -> Tensor:
        """Embeddings (batch, tokens, d) in the layout's form."""
        slots = self.layout.slots
        padded = hidden.gather(1, slots[..., None].expand(*slots.shape, hidden.shape[-1]))
        return self.layout.pack(padded)[None] if self.layout.packed else padded

    def restore(self, hidden: Tensor) -> Tensor:
        """The last layer's output as (batch, tokens, d): every token at its place with its last state, padding 0."""
        batch, tokens = self.shape
        full = hidden.new_zeros(batch * tokens, hidden.shape[-1])
        first = torch.arange(0, batch * tokens, tokens, device=hidden.device)[:, None]
        for layout, states in (*self._states, (self.layout, hidden)):
            # later states of the same tokens take the place of earlier ones
            flat = states[0] if layout.packed else layout.pack(states)
            full.index_copy_(0, layout.pack(first + layout.slots), flat)
        return full.view(batch, tokens, -1)


class Continuation(Pass):
    """New tokens after a prompt whose key-value cache has another length in each layer; none is eliminated.

    Args:
        batch: examples.
        tokens: new tokens of each, all of them real.
        cached: which keys of each layer's cache are real, (batch, keys); extended by the new tokens.
    """

    def __init__(self, batch: int, tokens: int, cached: list[Tensor]) -> None:
        real = cached[0].new_ones(batch, tokens)
        super().__init__(real, (1.0,) * len(cached), Selection(causal=True), packed=False)
        for layer, valid in enumerate(cached):
            cached[layer] = torch.cat([valid, real], dim=1)
        self.keys = cached

    @property
    def triangle(self) -> bool:
        """No: there are more keys than queries."""
        return False

    def enter(self, layer: int) -> None:
        """Begin a layer."""
        self.layer = layer

    def mask(self) -> Tensor | None:
        """All real keys of the layer's cache, and of the new tokens those before."""
        valid, new = self.keys[self.layer], self.layout.slots.shape[1]
        keys = valid.shape[1]
        reach = torch.ones(new, keys, dtype=torch.bool, device=valid.device).tril(keys - new)
        return valid[:, None, None, :] & reach


def current() -> Pass:
    """The pass that this thread is in.

    Raises:
        SecateurError: none has begun: an attention module was called outside its model.
    """
    now = CURRENT.get()
    if now is None:
        raise SecateurError("Tokens are eliminated in a pass of the whole model: call the model, not a part of it.")
    return now
