"""`SubNetwork`: which units of each block are kept; scoring, search, cost and cutting all speak it."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import Site, Sites, sites

Mask = tuple[bool, ...]


@dataclass(frozen=True)
class SubNetwork:
    """Kept units of every block, in the order of `families.sites(model)`.

    Attributes:
        heads: for each attention block a mask over its heads, True = kept.
        neurons: for each feed-forward block a mask over its neurons.
    """

    heads: tuple[Mask, ...]
    neurons: tuple[Mask, ...]

    @classmethod
    def full(cls, model: nn.Module | Sites) -> SubNetwork:
        """The sub-network that keeps everything."""
        found = model if isinstance(model, Sites) else sites(model)
        return cls(
            tuple((True,) * site.units for site in found.heads),
            tuple((True,) * site.units for site in found.neurons),
        )

    @classmethod
    def from_masks(cls, heads: Sequence[Tensor], neurons: Sequence[Tensor]) -> SubNetwork:
        """From one tensor per block, shape (units,); non-zero = kept."""
        return cls(
            tuple(tuple(bool(v) for v in mask.tolist()) for mask in heads),
            tuple(tuple(bool(v) for v in mask.tolist()) for mask in neurons),
        )

    def masks(self, dtype: torch.dtype = torch.float32) -> tuple[list[Tensor], list[Tensor]]:
        """(heads, neurons) as one tensor of zeros and ones per block."""
        return (
            [torch.tensor(mask, dtype=dtype) for mask in self.heads],
            [torch.tensor(mask, dtype=dtype) for mask in self.neurons],
        )

    @property
    def head_widths(self) -> tuple[int, ...]:
        """Heads kept in each attention block."""
        return tuple(sum(mask) for mask in self.heads)

    @property
    def neuron_widths(self) -> tuple[int, ...]:
        """Neurons kept in each feed-forward block."""
        return tuple(sum(mask) for mask in self.neurons)

    @property
    def keeps_everything(self) -> bool:
        return all(all(mask) for mask in (*self.heads, *self.neurons))

    def then(self, other: SubNetwork) -> SubNetwork:
        """This cut followed by `other`, which is written in the units this one leaves."""
        return SubNetwork(
            tuple(_compose(a, b) for a, b in zip(self.heads, other.heads, strict=True)),
            tuple(_compose(a, b) for a, b in zip(self.neurons, other.neurons, strict=True)),
        )

    def prefixes(self) -> list[SubNetwork]:
        """Its first layer alone, its first two, and so on to all that it has; itself if it has none.

        For models of one stack, whose layers have one block of heads and one of neurons each.
        """
        layers = [i for i, pair in enumerate(zip(self.heads, self.neurons, strict=True)) if any(map(any, pair))]
        return [SubNetwork(_until(i, self.heads), _until(i, self.neurons)) for i in layers[:-1]] + [self]

    def check_fits(self, found: Sites) -> None:
        """Raise `SecateurError` unless every mask is as long as its block has units."""
        for what, masks, blocks in (("heads", self.heads, found.heads), ("neurons", self.neurons, found.neurons)):
            if len(masks) != len(blocks):
                raise SecateurError(
                    f"The sub-network lists {what} for {len(masks)} blocks, the model has {len(blocks)}."
                )
            for mask, site in zip(masks, blocks, strict=True):
                if len(mask) != site.units:
                    raise SecateurError(
                        f"The sub-network lists {len(mask)} {what} for '{site.name}', which has {site.units}."
                    )

    def empty_blocks(self, found: Sites) -> list[Site]:
        """The blocks of a model that are left without units."""
        return [site for site, mask in zip(found, (*self.heads, *self.neurons), strict=True) if not any(mask)]

    def to_dict(self) -> dict[str, Any]:
        """Compact JSON form: each mask as "<units>:<hex>", most significant bit first."""
        return {"heads": [_pack(m) for m in self.heads], "neurons": [_pack(m) for m in self.neurons]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> SubNetwork:
        """Inverse of `to_dict`.

        Raises:
            SecateurError: a key is unknown or missing, or a mask cannot be read.
        """
        if not isinstance(data, dict) or set(data) != {"heads", "neurons"}:
            raise SecateurError(f"A sub-network has the keys 'heads' and 'neurons', not {sorted(data)}.")
        return cls(tuple(_unpack(m) for m in data["heads"]), tuple(_unpack(m) for m in data["neurons"]))

    @property
    def digest(self) -> str:
        """Short hash of the canonical form, equal for equal sub-networks on every machine."""
        return hashlib.sha256(repr(sorted(self.to_dict().items())).encode()).hexdigest()[:16]


@dataclass
class UnitScores:
    """Importance of every unit, larger = more important: one tensor of shape (units,) per block."""

    heads: list[Tensor]
    neurons: list[Tensor]


def _until(last: int, masks: tuple[Mask, ...]) -> tuple[Mask, ...]:
    """Masks of the blocks up to one, and no units behind it."""
    return tuple(mask if i <= last else (False,) * len(mask) for i, mask in enumerate(masks))


def _compose(first: Mask, second: Mask) -> Mask:
    if sum(first) != len(second):
        raise SecateurError(f"A cut of {len(second)} units cannot follow one that leaves {sum(first)}.")
    rest = iter(second)
    return tuple(kept and next(rest) for kept in first)


def _pack(mask: Mask) -> str:
    bits = int("".join("1" if kept else "0" for kept in mask) or "0", 2)
    digits = (len(mask) + 3) // 4
    return f"{len(mask)}:{bits:0{digits}x}" if digits else "0:"


def _unpack(text: object) -> Mask:
    units, _, digits = str(text).partition(":")
    if not units.isdecimal() or len(digits) != (int(units) + 3) // 4:
        raise SecateurError(f"'{str(text)[:40]}' is no mask: expected '<units>:<hex digits>'.")
    try:
        bits = int(digits or "0", 16)
    except ValueError:
        raise SecateurError(f"'{str(text)[:40]}' is no mask: '{digits[:40]}' is not hexadecimal.") from None
    if bits >> int(units):
        raise SecateurError(f"'{str(text)[:40]}' is no mask: it keeps more units than {units}.")
    return tuple(bool(bits >> (int(units) - 1 - i) & 1) for i in range(int(units)))
