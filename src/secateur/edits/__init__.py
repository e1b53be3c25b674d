"""Edits: serialisable changes of a model, applied by one function both after compression and before loading."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol

from torch import nn

from secateur.bits.modules import is_binary
from secateur.edits.binarize import Binarize
from secateur.edits.bypass import Bypass
from secateur.edits.slice import Slice
from secateur.edits.sparsify import Sparsify
from secateur.edits.tokens import DropTokens
from secateur.errors import InvalidModel, SecateurError

__all__ = [
    "EDITS",
    "STORED",
    "Binarize",
    "Bypass",
    "DropTokens",
    "Edit",
    "Slice",
    "Sparsify",
    "apply_edits",
    "edits_from_dicts",
    "merge",
]


class Edit(Protocol):
    """A change of a model that can be written to JSON and applied again."""

    type: ClassVar[str]

    @property
    def changes_shapes(self) -> bool:
        """Whether tensors end with other shapes; if not, the hub guards the folder."""
        ...

    def apply(self, model: nn.Module, *, empty: bool = False) -> None:
        """Change the model in place; with `empty=True` only shapes matter (the weights are read afterwards)."""
        ...

    def present(self, model: nn.Module) -> Edit:
        """The edit with the settings that the model has now, such as where its dial stands."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """JSON form, with the edit's name under "type"."""
        ...


EDITS: dict[str, type[Slice] | type[Bypass] | type[DropTokens] | type[Sparsify] | type[Binarize]] = {
    "slice": Slice,
    "bypass": Bypass,
    "drop_tokens": DropTokens,
    "sparsify": Sparsify,
    "binarize": Binarize,
}
STORED = (Sparsify, Binarize)
"""Edits that store weights in a form of their own."""
BINARY = "A binary model cannot be cut any more, but for its tokens: cut it first, and binarize it last."
AFTER_BINARIZING = (Binarize, DropTokens)
"""Edits that a binary model takes: other bits, and elimination, which changes no weight."""


def apply_edits(model: nn.Module, edits: Sequence[Edit], *, empty: bool = False) -> nn.Module:
    """Apply edits in order, in place.

    Args:
        model: a transformers model of a known family.
        edits: changes, each written in the units that the earlier ones leave.
        empty: True before weights are read: only shapes and behaviour are changed.

    Returns:
        The same model.

    Raises:
        SecateurError: the model is binary already, and the edit would change its weights.
    """
    for edit in edits:
        if is_binary(model) and not isinstance(edit, AFTER_BINARIZING):
            raise SecateurError(BINARY)
        edit.apply(model, empty=empty)
    return model


def merge(edits: Sequence[Edit]) -> list[Edit]:
    """The same change with neighbouring slices joined into one, and each sparse weight stored in one way, the last."""
    merged: list[Edit] = []
    for edit in edits:
        if any(isinstance(one, Binarize) for one in merged) and not isinstance(edit, AFTER_BINARIZING):
            raise SecateurError(BINARY)
        if isinstance(edit, Binarize):  # its bits take the place of values
            merged = [one for one in merged if not isinstance(one, STORED)]
        if isinstance(edit, Sparsify):
            merged = [left for one in merged if (left := one.without(edit.kept) if isinstance(one, Sparsify) else one)]
        last = merged[-1] if merged else None
        if isinstance(edit, Slice) and isinstance(last, Slice):
            merged[-1:] = [Slice(last.subnetwork.then(edit.subnetwork))]
        else:
            merged.append(edit)
    return merged


def edits_from_dicts(dicts: object) -> list[Edit]:
    """Read the edits of a config block.

    Raises:
        InvalidModel: not a list of objects, an unknown edit, an unknown or missing key.
    """
    if not isinstance(dicts, list):
        raise InvalidModel("config.json: 'edits' must be a list.")
    edits: list[Edit] = []
    for data in dicts:
        kind = data.get("type") if isinstance(data, dict) else None
        if kind not in EDITS:
            raise InvalidModel(
                f"config.json: unknown edit {kind!r}; this version knows {sorted(EDITS)}: upgrade secateur."
            )
        edits.append(EDITS[kind].from_dict(data))
    return edits
