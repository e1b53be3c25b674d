"""A whole engine as one operator of torch, `torch.ops.secateur.encode`, which compiled code does not look into."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError

if TYPE_CHECKING:
    from secateur.runtime.engine import Engine

_engines: WeakValueDictionary[int, Engine] = WeakValueDictionary()
_keys = itertools.count(1)


class EngineModule(nn.Module):
    """An engine that compiled code may call; see `Engine.module`."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self._engine = engine  # which lives as long as this
        self._key = next(_keys)
        _engines[self._key] = engine

    def forward(self, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
        """Logits, as `Engine.encoded` gives them."""
        return torch.ops.secateur.encode(self._key, ids, lengths, types)


@torch.library.custom_op(
    "secateur::encode", mutates_args=(), schema="(int engine, Tensor ids, Tensor lengths, Tensor? types=None) -> Tensor"
)
def encode(engine: int, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
    """Logits of examples whose tokens lie one behind the other.

    Args:
        engine: key of an engine that is alive.
        ids: (tokens,) int64.
        lengths: (examples,) int64, tokens of each.
        types: (tokens,) int64, token types; 0 if None.

    Returns:
        (examples, classes) float32, or (tokens, classes) of a classifier of tokens.
    """
    return _engine(engine).encoded(ids, lengths, types)


@encode.register_fake
def _(engine: int, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
    head = _engine(engine).plan.head
    last: Any = head.maps[-1]
    classes = getattr(last, "weight", last).shape[0]
    return torch.empty((lengths if head.first else ids).shape[0], classes, dtype=torch.float32, device="cpu")


def _engine(key: int) -> Engine:
    found = _engines.get(key)
    if found is None:
        raise SecateurError(
            "There is no such engine any more: keep it, or the module that it gave, while it is called."
        )
    return found
