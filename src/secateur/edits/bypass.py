"""`Bypass`: blocks that lost all units pass their input on as it is, without norm and bias."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from secateur.errors import InvalidModel, SecateurError
from secateur.families import sites
from secateur.subnetwork import SubNetwork


@dataclass(frozen=True)
class Bypass:
    """Make blocks without units the identity.

    After a `Slice` alone such a block still adds the bias of its output projection, and a model whose LayerNorm
    follows the residual sum still normalises; whole sub-blocks and layers that leave (Klein et al., TMLR 2024) do
    neither.

    Attributes:
        blocks: names of the blocks, as in `families.sites`.
    """

    blocks: tuple[str, ...]

    type: ClassVar[str] = "bypass"
    changes_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.blocks or not all(isinstance(name, str) for name in self.blocks):
            raise SecateurError("A bypass has names of blocks.")

    @classmethod
    def of(cls, model: nn.Module, sub: SubNetwork) -> Bypass | None:
        """The bypass of every block that a sub-network of a model leaves empty; None if there is none."""
        names = tuple(site.name for site in sub.empty_blocks(sites(model)))
        return cls(names) if names else None

    def apply(self, model: nn.Module, *, empty: bool = False) -> None:
        """Take bias and norm away, in place.

        Raises:
            SecateurError: the model has no such block, or the block still has units.
        """
        found = {site.name: site for site in sites(model)}
        for name in self.blocks:
            if name not in found:
                raise SecateurError(
                    f"The model has no block '{name}' to bypass; there are such as {next(iter(found))}."
                )
            site = found[name]
            if site.units:
                raise SecateurError(f"'{name}' still has {site.units} {site.kind}: only empty blocks are bypassed.")
            site.output.register_parameter("bias", None)
            if site.norm is not None:
                site.layer_module.set_submodule(site.block.norm, nn.Identity())

    def present(self, model: nn.Module) -> Bypass:
        """The edit itself: it has no settings."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, "blocks": list(self.blocks)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Bypass:
        """Inverse of `to_dict`.

        Raises:
            InvalidModel: unknown or missing keys, or no names.
        """
        try:
            values = {key: value for key, value in data.items() if key != "type"}
            return cls(**{**values, "blocks": tuple(values["blocks"])})
        except (SecateurError, KeyError, TypeError) as error:
            raise InvalidModel(f"config.json: the bypass edit cannot be read: {error}") from None
