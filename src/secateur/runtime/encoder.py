"""The layers of an encoder as an engine runs them, and the reference in torch."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from secateur.errors import InvalidData
from secateur.runtime.binary import BinaryAffine
from secateur.runtime.plan import Affine, LayerPlan, LinearMap, Plan
from secateur.tokens.scores import asking
from secateur.tokens.state import Pass, Selection


class Encoder(Protocol):
    """Layers of an encoder.

    Attributes:
        tier: what runs them.
        bytes: of their weights.
        storage: "maps", how many there are; "masked", how many keep only the weights that are not 0, in int8; "blocks",
            the share of blocks of 32 outputs and 64 inputs that are multiplied, because they are not all 0.
    """

    tier: str
    bytes: int
    storage: dict[str, float]

    def run(self, ids: Tensor, starts: Tensor, types: Tensor | None, threads: int, alpha: float = 0.0) -> Tensor:
        """Hidden states (tokens, width) of ids that lie one behind the other.

        Of a head that reads first tokens, only each example's first row has a meaning.

        Args:
            ids: (tokens,), int64.
            starts: (examples + 1,), int32: example i has the tokens starts[i] to starts[i + 1].
            types: token types, (tokens,), int64; 0 if None.
            threads: to compute with.
            alpha: setting of the dial, of a plan with one.

        Raises:
            InvalidData: ids, lengths or types that the model does not read.
        """
        ...

    def mapped(self, x: Tensor, affine: LinearMap, threads: int) -> Tensor:
        """What one of the plan's maps beside the layers makes of rows (rows, in): (rows, out) in float32."""
        ...

    def call(self) -> AbstractContextManager[None]:
        """Within it the encoder stays open: what is run and mapped for one result belongs into one call.

        Raises:
            SecateurError: it is closed.
        """
        ...

    def close(self) -> None:
        """Take no more calls, and give memory back once those under way have ended."""
        ...


def out_of_range(plan: Plan, what: int) -> InvalidData:
    """What a batch has that the model does not read: 1 an id, 2 an example's length, 3 a token type."""
    if what == 2:
        return InvalidData(f"An example has 1 to {plan.longest} tokens: cut it, or leave empty ones out.")
    name, table = ("Token ids", plan.words) if what == 1 else ("Token types", plan.types)
    return InvalidData(
        f"{name} go from 0 to {len(table) - 1 if table is not None else 0}: is this the model's tokenizer?"
    )


class TorchEncoder:
    """The layers in torch and fp32, maps over all tokens at once: a reference for the native ones."""

    tier = "torch"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        maps = [each for layer in plan.layers for each in layer.maps]
        self.bytes = sum((m.words if isinstance(m, BinaryAffine) else m.weight).nbytes for m in maps)
        self.storage = {"maps": len(maps), "masked": 0, "blocks": 1.0}

    def run(self, ids: Tensor, starts: Tensor, types: Tensor | None, threads: int, alpha: float = 0.0) -> Tensor:
        """See `Encoder`; threads are torch's."""
        plan = self.plan
        hidden = self._embedded(ids, starts, types)
        if plan.project is not None:
            hidden = mapped(hidden, plan.project)
        now = _pass(plan, starts, alpha)
        for number, layer in enumerate(plan.layers):
            if now is not None:
                now.enter(number)
            if layer.out is not None:
                context = self._context(layer, self._normed(hidden, layer.before_attention), _places(starts, now), now)
                hidden = self._normed(hidden + mapped(context, layer.out), layer.after_attention)
            if now is not None:
                now.choose()
                hidden = now.shorten(hidden[None])[0]
            if layer.down is not None:
                inner = self._inner(layer, self._normed(hidden, layer.before_feed_forward))
                hidden = self._normed(hidden + mapped(inner, layer.down), layer.after_feed_forward)
        if now is not None:
            hidden = now.restore(hidden[None])[_real(starts)]
        return self._normed(hidden, plan.last)

    def mapped(self, x: Tensor, affine: LinearMap, threads: int) -> Tensor:
        """See `Encoder`; threads are torch's."""
        return mapped(x, affine)

    def call(self) -> AbstractContextManager[None]:
        """Nothing is held."""
        return nullcontext()

    def close(self) -> None:
        """Nothing is held."""

    def _embedded(self, ids: Tensor, starts: Tensor, types: Tensor | None) -> Tensor:
        plan, lengths = self.plan, starts.diff()
        for number, (values, least, most) in enumerate(
            (
                (ids, 0, len(plan.words)),
                (lengths, 1, plan.longest + 1),
                (types, 0, 0 if plan.types is None else len(plan.types)),
            ),
            1,
        ):
            if values is not None and len(values) and not (values.min() >= least and values.max() < most):
                raise out_of_range(plan, number)
        first = starts[:-1].repeat_interleave(lengths)
        found = plan.words(ids).clone()
        if plan.positions is not None:
            found += functional.embedding(torch.arange(len(ids)) - first + plan.offset, plan.positions)
        if plan.types is not None:
            found += plan.types[0] if types is None else functional.embedding(types, plan.types)
        return self._normed(found, plan.norm)

    def _context(self, layer: LayerPlan, hidden: Tensor, places: list[Tensor], now: Pass | None) -> Tensor:
        """What each token reads of its example; `places` of its tokens in the input."""
        if not layer.heads:
            return hidden[:, :0]
        parts = [mapped(hidden, each) for each in layer.parts or (layer.qkv,) if each is not None]
        qkv = torch.cat(parts, dim=1).view(len(hidden), 3, layer.heads, layer.width)
        contexts, scores = [], []
        for part, where in zip(qkv.split([len(each) for each in places]), places, strict=True):
            q, k, v = part.permute(1, 2, 0, 3)
            q, k = _turned(layer, q, where), _turned(layer, k, where)
            bias = _bias(layer, where)
            attend = functional.scaled_dot_product_attention if layer.levels is None else layer.levels
            contexts.append(attend(q[None], k[None], v[None], bias)[0])
            if now is not None and now.scoring:
                scores.append(_score(layer, now, q, k, v, bias))
        if now is not None and now.scoring:
            now.observe(pad_sequence(scores, batch_first=True, padding_value=-torch.inf))
        return torch.cat([part.transpose(0, 1).flatten(1) for part in contexts])

    def _inner(self, layer: LayerPlan, x: Tensor) -> Tensor:
        """What a feed-forward block's last map reads, (tokens, neurons)."""
        if layer.up is None:
            return x[:, :0]
        inner = _activated(mapped(x, layer.up), self.plan.activation)
        return inner if layer.gate is None else inner * mapped(x, layer.gate)

    def _normed(self, x: Tensor, norm: Affine | None) -> Tensor:
        if norm is None:
            return x
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self.plan.epsilon)


def _pass(plan: Plan, starts: Tensor, alpha: float) -> Pass | None:
    """The state of token elimination; None where no token goes."""
    if plan.dropping is None or alpha == 0:
        return None
    edit = plan.dropping.edit
    how = Selection(edit.weighting, edit.diagonal, edit.beta, edit.queries, edit.protected, edit.recent)
    return Pass(_rows_of(starts), edit.shares(alpha), how, packed=True)


def _rows_of(starts: Tensor) -> Tensor:
    """(examples, longest): True where an example has a token."""
    lengths = starts.diff()
    return torch.arange(int(lengths.max())) < lengths[:, None]


def _real(starts: Tensor) -> tuple[Tensor, ...]:
    """Index of the tokens in padded rows."""
    return tuple(_rows_of(starts).nonzero().T)


def _places(starts: Tensor, now: Pass | None) -> list[Tensor]:
    """Of each example: places, in the input, of the tokens that are left."""
    if now is None:
        return [torch.arange(n) for n in starts.diff().tolist()]
    return [row[:n] for row, n in zip(now.layout.slots, now.layout.lengths, strict=True)]


def _score(layer: LayerPlan, now: Pass, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> Tensor:
    """Scores of an example's tokens, (tokens,), from the queries that ask."""
    real = torch.ones(1, q.shape[1], dtype=torch.bool)
    asked = asking(torch.tensor([q.shape[1]]), now.selection.queries, tokens=q.shape[1])
    q, k, v, bias = q[None, :, asked[0]], k[None], v[None], None if bias is None else bias[:, :, asked[0]]
    if layer.levels is not None:
        rounded = layer.levels.probabilities(q, k, bias) * layer.levels.probs.alpha.double()
        return now.score(rounded, real, layer.levels.value(v), asked)[0]
    logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
    return now.score((logits if bias is None else logits + bias).softmax(dim=-1), real, v, asked)[0]


def _bias(layer: LayerPlan, places: Tensor) -> Tensor | None:
    """What is added to scores, (1, heads or 1, queries, keys)."""
    if layer.relative is None and layer.window is None:
        return None
    apart = places[None] - places[:, None]
    found = torch.zeros(1, 1, 1) if layer.relative is None else layer.relative[:, apart + layer.relative.shape[1] // 2]
    return (found if layer.window is None else found.masked_fill(apart.abs() > layer.window, -torch.inf))[None]


def _turned(layer: LayerPlan, x: Tensor, places: Tensor) -> Tensor:
    """Queries or keys (heads, tokens, width), turned by the angles of their places."""
    if layer.rotary is None:
        return x
    cosines, sines = layer.rotary[places].chunk(2, dim=-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], dim=-1)


def mapped(x: Tensor, affine: LinearMap) -> Tensor:
    """What a map makes of rows."""
    if isinstance(affine, BinaryAffine):
        return affine(x)
    return functional.linear(x, affine.weight, affine.bias)


def _activated(x: Tensor, kind: str) -> Tensor:
    return (
        functional.relu(x)
        if kind == "relu"
        else functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    )
