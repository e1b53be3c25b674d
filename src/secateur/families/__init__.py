"""Where heads and neurons live in each architecture.

A `Family` lists its stacks of layers; a stack lists its attention blocks and its feed-forward block; a block lists the
`Cut`s, the tensor axes that shrink when one of its units goes. `sites(model)` resolves the table on a live model (also
one that was sliced before) and raises `UnsupportedModel` if the installed transformers names things differently.
"""

from secateur.families.resolve import (
    Site,
    Sites,
    axis,
    family_of,
    in_features,
    out_features,
    output_weight,
    sites,
    weight_of,
)
from secateur.families.spec import Block, Cut, Family, Stack, UnitKind
from secateur.families.table import FAMILIES

__all__ = [
    "FAMILIES",
    "Block",
    "Cut",
    "Family",
    "Site",
    "Sites",
    "Stack",
    "UnitKind",
    "axis",
    "family_of",
    "in_features",
    "out_features",
    "output_weight",
    "sites",
    "weight_of",
]
