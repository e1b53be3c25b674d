"""`Sparsify`: weights of linear maps that are mostly zero, stored as a bit for each and the values of the others."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from secateur.errors import InvalidModel, SecateurError
from secateur.sparsity.storage import Values, blocks_of, decode, encode
from secateur.sparsity.weights import base_of, owner_of, prunable


@dataclass(frozen=True)
class Sparsify:
    """Store some weights as mask and values; a model opens with plain dense ones.

    Attributes:
        kept: by the name of a weight in the base model, how many blocks of it are not zero.
        values: how values are stored: "fp32", "bf16", or "int8" with a scale for each row.
        block: rows × columns that are zero together.
    """

    kept: dict[str, int]
    values: Values = "fp32"
    block: tuple[int, int] = (1, 1)

    type: ClassVar[str] = "sparsify"
    changes_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.values not in get_args(Values):
            raise SecateurError(f"Values are stored as {', '.join(get_args(Values))}, not as {self.values!r}.")
        if not self.kept or not all(type(count) is int and count >= 0 for count in self.kept.values()):
            raise SecateurError("A sparse model has weights, and of each a number of blocks that are not zero.")
        if len(self.block) != 2 or min(self.block) < 1:
            raise SecateurError("A block has rows and columns, from 1.")

    def apply(self, model: nn.Module, *, empty: bool = False) -> None:
        """Check that the model has the weights: zeros need nothing else to work.

        Raises:
            SecateurError: a weight is missing.
        """
        named = dict(base_of(model)[0].named_parameters())
        for name in self.kept:
            if name not in named or named[name].dim() != 2:
                raise SecateurError(f"The model has no matrix '{name}'.")

    def present(self, model: nn.Module) -> Sparsify:
        """The edit with as many blocks as are not zero now; of single weights, if a slice left no whole blocks."""
        named = dict(base_of(model)[0].named_parameters())
        whole = all(n % b == 0 for name in self.kept for n, b in zip(named[name].shape, self.block, strict=True))
        block = self.block if whole else (1, 1)
        return Sparsify({name: _blocks_there(named[name], block) for name in self.kept}, self.values, block)

    def without(self, names: Collection[str]) -> Sparsify | None:
        """The edit for other weights than these; None if there are none."""
        kept = {name: count for name, count in self.kept.items() if name not in names}
        return Sparsify(kept, self.values, self.block) if kept else None

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "kept": dict(self.kept), "values": self.values, "block": list(self.block)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Sparsify:
        """Inverse of `to_dict`.

        Raises:
            InvalidModel: unknown or missing keys, or values that cannot be read.
        """
        try:
            values = {key: value for key, value in data.items() if key != "type"}
            return cls(**{**values, "block": tuple(values["block"])})
        except (SecateurError, KeyError, TypeError, AttributeError) as error:
            raise InvalidModel(f"config.json: the sparsify edit cannot be read: {error}") from None

    def shape_for_reading(self, model: nn.Module) -> None:
        """Before weights are read: each weight takes the shape of its values, and gets places for mask and scale."""
        for name in self.kept:
            owner, key = owner_of(model, name)
            weight = getattr(owner, key)
            owner.__dict__[_SHAPE] = tuple(weight.shape)
            for part, shape, dtype in self._parts(name, tuple(weight.shape), weight.dtype):
                place = torch.empty(shape, dtype=dtype, device=weight.device)
                if part == "values":
                    setattr(owner, key, nn.Parameter(place, requires_grad=place.is_floating_point()))
                else:
                    owner.register_buffer(f"{key}_{part}", place)

    def restore(self, model: nn.Module, dtype: torch.dtype) -> None:
        """After weights were read: each weight is dense again."""
        for name in self.kept:
            owner, key = owner_of(model, name)
            parts = {"values": getattr(owner, key).detach(), "mask": getattr(owner, f"{key}_mask")}
            if self.values == "int8":
                parts["scale"] = getattr(owner, f"{key}_scale")
            dense = decode(parts, owner.__dict__.pop(_SHAPE), dtype, self.block)
            for part in parts.keys() - {"values"}:
                delattr(owner, f"{key}_{part}")
            setattr(owner, key, nn.Parameter(dense))

    def encode(self, state: dict[str, Tensor], model: nn.Module) -> None:
        """Weights of a model's state dict in the form that is stored, in place."""
        prefix = base_of(model)[1]
        for key in (prefix + name for name in self.kept):
            for part, tensor in encode(state[key].detach(), self.values, self.block).items():
                state[key if part == "values" else f"{key}_{part}"] = tensor

    def decode(self, state: dict[str, Tensor], model: nn.Module, prefix: str = "") -> None:
        """Inverse of `encode` on what was stored, in place; dense weights stay."""
        base, inside = base_of(model)
        named = dict(base.named_parameters())
        for name in self.kept:
            key = prefix + inside + name
            if f"{key}_mask" not in state:
                continue
            parts = {"values": state[key], "mask": state.pop(f"{key}_mask")}
            if f"{key}_scale" in state:
                parts["scale"] = state.pop(f"{key}_scale")
            rows, columns = named[name].shape
            state[key] = decode(parts, (rows, columns), named[name].dtype, self.block)

    def _parts(
        self, name: str, shape: tuple[int, int], dtype: torch.dtype
    ) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """Name, shape and dtype of what is stored of a weight."""
        size = self.block[0] * self.block[1]
        stored = torch.int8 if self.values == "int8" else dtype
        places = -(-(shape[0] * shape[1] // size) // 8)
        parts: list[tuple[str, tuple[int, ...], torch.dtype]] = [
            ("values", (self.kept[name] * size,), stored),
            ("mask", (places,), torch.uint8),
        ]
        return [*parts, ("scale", (shape[0],), torch.float32)] if self.values == "int8" else parts


_SHAPE = "_secateur_shape"


def sparsified(weights: dict[str, nn.Parameter], values: Values = "fp32", block: tuple[int, int] = (1, 1)) -> Sparsify:
    """The edit for weights, which are rounded in place to what will be stored.

    Args:
        weights: by name in the base model.
        values: how values are stored.
        block: rows × columns that are zero together.

    Raises:
        SecateurError: a weight does not divide into blocks.
    """
    for name, weight in weights.items():
        rows, columns = weight.shape
        if rows % block[0] or columns % block[1]:
            raise SecateurError(f"{name} is {rows} x {columns} and does not divide into blocks of {block}.")
        if values != "fp32":
            parts = encode(weight.detach(), values, block)
            with torch.no_grad():
                weight.copy_(decode(parts, (rows, columns), weight.dtype, block))
    return Sparsify({name: _blocks_there(weight, block) for name, weight in weights.items()}, values, block)


def hold_zeros(model: nn.Module, names: Collection[str] | None = None) -> list[RemovableHandle]:
    """Keep zeros at zero while a model is trained further: their gradients are 0 from now on.

    A fresh optimiser, with or without weight decay, then never moves them.

    Args:
        model: a model of a known family.
        names: weights in the base model; those of all linear maps of the layers if None.

    Returns:
        Handles: `remove()` lets the zeros go.
    """
    found = prunable(model)
    moving = {name: w for name, w in found.items() if w.requires_grad and (names is None or name in names)}
    masks = {name: weight.detach().ne(0) for name, weight in moving.items()}

    def held(name: str, grad: Tensor) -> Tensor:
        masks[name] = masks[name].to(grad.device)  # a trainer may have moved the model in between
        return grad * masks[name]

    return [found[name].register_hook(partial(held, name)) for name in masks]


def _blocks_there(weight: Tensor, block: tuple[int, int]) -> int:
    return int(blocks_of(weight.detach(), block).ne(0).any(dim=1).sum())
