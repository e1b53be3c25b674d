"""`Slice`: remove heads and neurons for good, so that the tensors are smaller."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import nn

from secateur.errors import InvalidModel, SecateurError
from secateur.families import axis, output_weight, sites, weight_of
from secateur.quirks import after_slice, shorten, unit_index
from secateur.subnetwork import SubNetwork


@dataclass(frozen=True)
class Slice:
    """Keep only the units of a sub-network; layers may end with different widths, or with no units at all."""

    subnetwork: SubNetwork
    type: ClassVar[str] = "slice"

    @property
    def changes_shapes(self) -> bool:
        """Whether any unit goes."""
        return not all(all(mask) for mask in (*self.subnetwork.heads, *self.subnetwork.neurons))

    def apply(self, model: nn.Module, *, empty: bool = False) -> None:
        """Shorten every tensor that the family table names, in place.

        Args:
            model: the model whose units the sub-network lists.
            empty: accepted for the protocol; shapes on the meta device are cut the same way.

        Raises:
            SecateurError: the sub-network does not fit the model.
        """
        found = sites(model)
        self.subnetwork.check_fits(found)
        masks = (*self.subnetwork.heads, *self.subnetwork.neurons)
        for site, mask in zip(found, masks, strict=True):
            if all(mask):
                continue
            kept = [i for i, keep in enumerate(mask) if keep]
            for module, cut in site.cuts:
                dimension = axis(module, cut.side)
                index = unit_index(kept, site.units, weight_of(module).shape[dimension], cut.parts)
                shorten(module, dimension, index, bias=cut.side == "out")
            after_slice(site, kept, found.family.quirk)

    def present(self, model: nn.Module) -> Slice:
        """The edit itself: a cut has no settings."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **self.subnetwork.to_dict()}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Slice:
        """Inverse of `to_dict`.

        Raises:
            InvalidModel: unknown or missing keys, or masks that cannot be read.
        """
        try:
            return cls(SubNetwork.from_dict({key: value for key, value in data.items() if key != "type"}))
        except (SecateurError, TypeError) as error:
            raise InvalidModel(f"config.json: the slice edit cannot be read: {error}") from None


def nonzero_units(model: nn.Module) -> SubNetwork:
    """The heads and neurons that do anything: those whose weights out of the unit are not all zero.

    Masked equals sliced: a unit without them adds nothing to the model's output, whatever its biases.
    """
    found = sites(model)
    there = [
        output_weight(site).detach().unflatten(1, (site.units, site.width)).ne(0).any(dim=2).any(dim=0)
        if site.units
        else torch.ones(0)
        for site in found
    ]
    return SubNetwork.from_masks(there[: len(found.heads)], there[len(found.heads) :])
