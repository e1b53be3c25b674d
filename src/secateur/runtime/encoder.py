"""The layers of an encoder as an engine runs them, and the reference in torch."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional

from secateur.errors import InvalidData
from secateur.runtime.plan import Affine, LayerPlan, Plan


class Encoder(Protocol):
    """Layers of an encoder.

    Attributes:
        tier: what runs them.
        bytes: of their weights.
    """

    tier: str
    bytes: int

    def run(self, ids: Tensor, starts: Tensor, types: Tensor | None, threads: int) -> Tensor:
        """Hidden states (tokens, width) of ids that lie one behind the other.

        Args:
            ids: (tokens,), int64.
            starts: (examples + 1,), int32: example i has the tokens starts[i] to starts[i + 1].
            types: token types, (tokens,), int64; 0 if None.
            threads: to compute with.

        Raises:
            InvalidData: ids, lengths or types that the model does not read.
        """
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


def out_of_range(plan: Plan, what: int) -> InvalidData:
    """What a batch has that the model does not read: 1 an id, 2 an example's length, 3 a token type."""
    if what == 2:
        return InvalidData(f"An example has 1 to {plan.longest} tokens: cut it, or leave empty ones out.")
    name, table = ("Token ids", plan.words) if what == 1 else ("Token types", plan.types)
    return InvalidData(
        f"{name} go from 0 to {len(table) - 1 if table is not None else 0}: is this the model's tokenizer?"
    )


def projected(plan: Plan, embeddings: Tensor) -> Tensor:
    """Embeddings in the hidden width."""
    return embeddings if plan.project is None else _mapped(embeddings, plan.project)


class TorchEncoder:
    """The layers in torch and fp32, maps over all tokens at once: a reference for the native ones."""

    tier = "torch"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        maps = [
            m
            for layer in plan.layers
            for m in (layer.qkv, layer.out, layer.up, layer.gate, layer.down)
            if m is not None
        ]
        self.bytes = sum(m.weight.nbytes for m in maps)

    def run(self, ids: Tensor, starts: Tensor, types: Tensor | None, threads: int) -> Tensor:
        """See `Encoder`; threads are torch's."""
        hidden = projected(self.plan, self._embedded(ids, starts, types))
        lengths = starts.diff().tolist()
        for layer in self.plan.layers:
            if layer.out is not None:
                context = self._context(layer, self._normed(hidden, layer.before_attention), lengths)
                self._settle(hidden, _mapped(context, layer.out), layer.after_attention)
            if layer.down is not None:
                inner = self._inner(layer, self._normed(hidden, layer.before_feed_forward))
                self._settle(hidden, _mapped(inner, layer.down), layer.after_feed_forward)
        return self._normed(hidden, self.plan.last)

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
        found = functional.embedding(ids, plan.words)
        if plan.positions is not None:
            found += functional.embedding(torch.arange(len(ids)) - first + plan.offset, plan.positions)
        if plan.types is not None:
            found += plan.types[0] if types is None else functional.embedding(types, plan.types)
        return self._normed(found, plan.norm)

    def _context(self, layer: LayerPlan, hidden: Tensor, lengths: list[int]) -> Tensor:
        if layer.qkv is None:
            return hidden[:, :0]
        qkv = _mapped(hidden, layer.qkv).view(len(hidden), 3, layer.heads, layer.width)
        parts = [part.permute(1, 2, 0, 3) for part in qkv.split(lengths)]
        found = [
            functional.scaled_dot_product_attention(
                _turned(layer, q)[None], _turned(layer, k)[None], v[None], _bias(layer, q.shape[1])
            )[0]
            for q, k, v in parts
        ]
        return torch.cat([part.transpose(0, 1).flatten(1) for part in found])

    def _inner(self, layer: LayerPlan, x: Tensor) -> Tensor:
        """What a feed-forward block's last map reads, (tokens, neurons)."""
        if layer.up is None:
            return x[:, :0]
        inner = _activated(_mapped(x, layer.up), self.plan.activation)
        return inner if layer.gate is None else inner * _mapped(x, layer.gate)

    def _settle(self, hidden: Tensor, added: Tensor, norm: Affine | None) -> None:
        hidden.copy_(self._normed(hidden + added, norm))

    def _normed(self, x: Tensor, norm: Affine | None) -> Tensor:
        if norm is None:
            return x
        return functional.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, self.plan.epsilon)


def _bias(layer: LayerPlan, tokens: int) -> Tensor | None:
    """What is added to scores, (1, heads or 1, queries, keys)."""
    if layer.relative is None and layer.window is None:
        return None
    place = torch.arange(tokens)
    apart = place[None] - place[:, None]
    found = torch.zeros(1, 1) if layer.relative is None else layer.relative[:, apart + layer.relative.shape[1] // 2]
    return (found if layer.window is None else found.masked_fill(apart.abs() > layer.window, -torch.inf))[None]


def _turned(layer: LayerPlan, x: Tensor) -> Tensor:
    """Queries or keys (heads, tokens, width), turned by the angles of their places."""
    if layer.rotary is None:
        return x
    cosines, sines = layer.rotary[: x.shape[1]].chunk(2, dim=-1)
    low, high = x.chunk(2, dim=-1)
    return torch.cat([low * cosines - high * sines, high * cosines + low * sines], dim=-1)


def _mapped(x: Tensor, affine: Affine) -> Tensor:
    return functional.linear(x, affine.weight, affine.bias)


def _activated(x: Tensor, kind: str) -> Tensor:
    return (
        functional.relu(x)
        if kind == "relu"
        else functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    )
