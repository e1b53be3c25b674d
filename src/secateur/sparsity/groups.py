"""Which weights live or die together: those of a pattern inside each matrix, or all weights of a head or a neuron."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Protocol

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import axis, sites, weight_of
from secateur.sparsity.selection import Blocks, NofM, Units, choose, least, root
from secateur.sparsity.weights import turned


class Groups(Protocol):
    """Groups of the weights of a live model.

    Attributes:
        largest: weights of the largest unit that is chosen as one.
    """

    largest: int

    def size(self, name: str) -> int:
        """Weights that a weight of this matrix shares its prior with, itself included."""
        ...

    def squares(self, weights: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
        """By matrix: ‖w‖² of each weight's group, broadcasting to its shape; None for weights that stand alone."""
        ...

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, floor: float) -> dict[str, Tensor]:
        """Masks, True for weights that stay: the groups with the lowest scores go until so large a share is gone."""
        ...


def groups_of(model: nn.Module, weights: Mapping[str, nn.Parameter], pattern: Blocks | NofM | Units) -> Groups:
    """The groups that a pattern makes of a model's weights.

    Raises:
        SecateurError: a matrix cannot be divided so, or a head is among the weights in part only.
    """
    return UnitGroups(model, weights) if isinstance(pattern, Units) else MatrixGroups(model, weights, pattern)


class MatrixGroups:
    """Single weights, blocks, or runs of neighbours along the inputs, in each matrix by itself."""

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter], pattern: Blocks | NofM) -> None:
        self.pattern = pattern
        self.largest = pattern.size
        self.turned = {name for name in weights if turned(model, name)}
        for name, weight in weights.items():
            shape = self._rows(name, weight).shape
            if not pattern.fits(shape):
                raise SecateurError(
                    f"{name} is {shape[0]} x {shape[1]} and cannot be divided into {pattern.text}: choose another "
                    "pattern, or other weights."
                )

    def _rows(self, name: str, tensor: Tensor) -> Tensor:
        """Something of a weight's shape as (out, in), and back."""
        return tensor.T if name in self.turned else tensor

    def size(self, name: str) -> int:
        return self.pattern.size if isinstance(self.pattern, Blocks) else 1

    def squares(self, weights: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
        blocks = self.pattern
        if not isinstance(blocks, Blocks) or blocks.single:
            return lambda name: None
        return lambda name: self._rows(name, blocks.squares(self._rows(name, weights[name])))  # one matrix at a time

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, floor: float) -> dict[str, Tensor]:
        masks = choose([self._rows(n, score) for n, score in scores.items()], sparsity, self.pattern, floor)
        return {name: self._rows(name, mask) for name, mask in zip(scores, masks, strict=True)}


class UnitGroups:
    """Heads and neurons: the rows of the maps into them, and the columns of the map out of them.

    A head of BERT has 4 · hidden · head width weights, a neuron 2 · hidden. They are ranked by the root of the mean
    (signed) square, so that both can be compared.
    """

    def __init__(self, model: nn.Module, weights: Mapping[str, nn.Parameter]) -> None:
        names = {id(weight): name for name, weight in weights.items()}
        self.members: list[list[tuple[str, int, int]]] = []  # of each block: weight, axis of its units, parts
        self.units: list[int] = []
        self.sizes: list[int] = []  # weights of a unit
        for site in sites(model):
            found = [(weight_of(module), axis(module, cut.side), cut.parts) for module, cut in site.cuts]
            there = [(names[id(weight)], *rest) for weight, *rest in found if id(weight) in names]
            if not there:
                continue
            if len(there) < len(found):
                raise SecateurError(
                    f"The weights asked for hold '{there[0][0]}' but not all maps of {site.name}: whole {site.kind} go "
                    "with the weights of all their maps."
                )
            self.members.append(there)  # type: ignore[arg-type]
            self.units.append(site.units)
            self.sizes.append(sum(weight.numel() for weight, *_ in found) // site.units)
        self.largest = max(self.sizes, default=1)
        self.shapes = {name: weight.shape for name, weight in weights.items()}
        self._size = {n: size for group, size in zip(self.members, self.sizes, strict=True) for n, *_ in group}

    def size(self, name: str) -> int:
        return self._size[name]

    def squares(self, weights: Mapping[str, Tensor]) -> Callable[[str], Tensor | None]:
        return self._spread(self._sums({name: weight.float().square() for name, weight in weights.items()})).get

    def choose(self, scores: Mapping[str, Tensor], sparsity: float, floor: float) -> dict[str, Tensor]:
        """As few of the lowest units as reach the share go; each block keeps a share `floor` of its units."""
        signed = {name: score.float() * score.float().abs() for name, score in scores.items()}
        ranks = [root(total / size).cpu() for total, size in zip(self._sums(signed), self.sizes, strict=True)]
        if not all(bool(rank.isfinite().all()) for rank in ranks):
            raise SecateurError("Heads and neurons cannot be ranked: a score is not a finite number.")
        for rank in ranks:
            if keep := least(rank, floor):
                rank[rank.topk(keep).indices] = torch.inf
        everything = torch.cat(ranks)
        weight = torch.cat([torch.full((n,), size) for n, size in zip(self.units, self.sizes, strict=True)])
        order = everything.argsort(stable=True)
        gone = weight[order].cumsum(0)
        count = int((gone < sparsity * int(gone[-1]) - 1e-6).sum()) + 1 if sparsity > 0 else 0
        stays = torch.ones(len(order), dtype=torch.bool)
        stays[order[:count]] = False
        stays |= everything.isinf()
        spread = self._spread(list(stays.split(self.units)))
        return {n: mask.expand(self.shapes[n]).to(scores[n].device, copy=True) for n, mask in spread.items()}

    def _sums(self, values: Mapping[str, Tensor]) -> list[Tensor]:
        """Sum over the weights of each unit: (units,) for each block."""
        sums = []
        for members, units in zip(self.members, self.units, strict=True):
            parts = [values[n].movedim(a, 0).reshape(p, units, -1).sum(dim=(0, 2)) for n, a, p in members]
            sums.append(torch.stack(parts).sum(0))  # a block lies on one device
        return sums

    def _spread(self, values: list[Tensor]) -> dict[str, Tensor]:
        """Inverse of `_sums`: a value of each unit where its weights are, of shape (rows, 1) or (1, columns)."""
        spread = {}
        for members, units, value in zip(self.members, self.units, values, strict=True):
            for name, along, parts in members:
                length = self.shapes[name][along]
                line = value.repeat_interleave(length // (parts * units)).repeat(parts)
                spread[name] = line[:, None] if along == 0 else line
        return spread


def kinds_of(pattern: Blocks | NofM | Units) -> Collection[str]:
    """The blocks of a model whose weights a pattern is for."""
    return pattern.kinds if isinstance(pattern, Units) else ("heads", "neurons")
