"""Which weights go: one threshold for all matrices, exact at any size, and patterns of weights that go together."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor

from secateur.errors import SecateurError

_HALF = 1 << 16
_EACH = 64  # one of so many values is in the sample


def kth_smallest(tensors: Sequence[Tensor], k: int) -> float:
    """The k-th smallest value, from 1, of all tensors together.

    Exact for float32 and narrower types, without sorting them all: a sample brackets it, and float32 bit patterns of
    what lies between, read as whole numbers, have the order of the values, so two histograms of 2¹⁶ bins find it.

    Raises:
        SecateurError: a value is not finite, or there are fewer than k.
    """
    if not 1 <= k <= sum(tensor.numel() for tensor in tensors):
        raise SecateurError(f"There is no {k}th of {sum(tensor.numel() for tensor in tensors)} values.")
    values = [tensor.detach().reshape(-1).float() for tensor in tensors if tensor.numel()]
    if not all(bool(torch.stack(value.aminmax()).isfinite().all()) for value in values):
        raise SecateurError("Weights cannot be ranked: a score is not a finite number.")
    near, k = _narrowed(values, k)
    high, before = _bin((_ordered(value) >> 16 for value in near), k, offset=_HALF // 2)
    keys = (_ordered(value) for value in near)  # once more, so that only one matrix's are there at a time
    lows = (key[(key >> 16) == high - _HALF // 2] & (_HALF - 1) for key in keys)
    low, _ = _bin(lows, k - before, offset=0)
    found = torch.tensor(((high - _HALF // 2) << 16) | low, dtype=torch.int32)
    return float(_swapped(found).view(torch.float32))


def _narrowed(values: Sequence[Tensor], k: int) -> tuple[Sequence[Tensor], int]:
    """The values that a sample's neighbours of the k-th enclose, and which of them is the k-th; all if they miss it."""
    sample = torch.cat([value[::_EACH].cpu() for value in values]).sort().values
    place, room = k * len(sample) // sum(value.numel() for value in values), 4 * math.isqrt(len(sample))
    lowest, highest = float(sample[max(place - room, 0)]), float(sample[min(place + room, len(sample) - 1)])
    inside = torch.cat([value[(value >= lowest) & (value <= highest)].cpu() for value in values])
    below = sum(int((value < lowest).sum()) for value in values)
    return ([inside], k - below) if below < k <= below + len(inside) else (values, k)


def _ordered(values: Tensor) -> Tensor:
    """Whole numbers in the order of the values; -0 counts as 0."""
    return _swapped((values + 0.0).view(torch.int32))


def _swapped(bits: Tensor) -> Tensor:
    """Negative numbers in ascending order; its own inverse."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _bin(parts: Iterable[Tensor], k: int, offset: int) -> tuple[int, int]:
    """The bin that holds the k-th value, and how many values lie below it."""
    count = torch.zeros(_HALF, dtype=torch.int64)
    for part in parts:
        count += torch.bincount(part.long() + offset, minlength=_HALF).cpu()
    held = count.cumsum(0)
    found = int(torch.searchsorted(held, k))
    return found, int(held[found] - count[found])


class Pattern(Protocol):
    """Units of weights that go together.

    Attributes:
        text: how it is written in settings.
    """

    @property
    def text(self) -> str: ...

    @property
    def most(self) -> float:
        """The largest sparsity it can reach."""
        ...

    @property
    def size(self) -> int:
        """Weights of a unit."""
        ...

    def units(self, score: Tensor) -> Tensor:
        """Scores of the units, any shape, from scores of a matrix's weights, (out, in)."""
        ...

    def kept(self, score: Tensor, units: Tensor) -> Tensor:
        """Mask of a matrix's weights, True for those that stay, from the units that stay."""
        ...

    def fits(self, shape: torch.Size) -> bool:
        """Whether a matrix can be divided so."""
        ...


@dataclass(frozen=True)
class Blocks:
    """Blocks of rows × columns, ranked by the root of the mean (signed) square; 1 × 1 are single weights."""

    rows: int = 1
    columns: int = 1
    most: ClassVar[float] = 1.0

    @property
    def text(self) -> str:
        return f"{self.rows}x{self.columns}"

    @property
    def size(self) -> int:
        return self.rows * self.columns

    @property
    def single(self) -> bool:
        """Whether each weight stands alone."""
        return self.size == 1

    def units(self, score: Tensor) -> Tensor:
        return score if self.single else root(self._mean(score * score.abs()))

    def squares(self, weight: Tensor) -> Tensor:
        """‖w‖² of each weight's block, of the matrix's shape."""
        return self._spread(self._mean(weight.float().square()) * self.size)

    def kept(self, score: Tensor, units: Tensor) -> Tensor:
        return units if self.single else self._spread(units)

    def fits(self, shape: torch.Size) -> bool:
        return shape[0] % self.rows == 0 and shape[1] % self.columns == 0

    def _mean(self, values: Tensor) -> Tensor:
        return values.unflatten(0, (-1, self.rows)).unflatten(2, (-1, self.columns)).mean(dim=(1, 3))

    def _spread(self, units: Tensor) -> Tensor:
        return units.repeat_interleave(self.rows, 0).repeat_interleave(self.columns, 1)


@dataclass(frozen=True)
class NofM:
    """At most n of each m neighbours along the inputs stay.

    A unit is a run of m weights, and its score is what it would lose; the schedule says how many runs are bound.
    """

    n: int
    m: int

    @property
    def text(self) -> str:
        return f"{self.n}:{self.m}"

    @property
    def most(self) -> float:
        return 1 - self.n / self.m

    @property
    def size(self) -> int:
        return self.m

    def units(self, score: Tensor) -> Tensor:
        smallest = self._runs(score).sort(dim=-1).values[..., : self.m - self.n]
        return root((smallest * smallest.abs()).sum(dim=-1))

    def kept(self, score: Tensor, units: Tensor) -> Tensor:
        order = self._runs(score).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        return ((order < self.n) | units[..., None]).flatten(-2)

    def fits(self, shape: torch.Size) -> bool:
        return shape[1] % self.m == 0

    def _runs(self, score: Tensor) -> Tensor:
        return score.unflatten(1, (-1, self.m))


@dataclass(frozen=True)
class Units:
    """Whole heads, whole neurons, or both: `groups` says which weights those are in a model.

    Attributes:
        text: "heads", "neurons" or "units".
    """

    text: str
    most: ClassVar[float] = 1.0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The blocks that lose units."""
        return ("heads", "neurons") if self.text == "units" else (self.text,)


def root(squares: Tensor) -> Tensor:
    """The root of signed squares: scores of movement may be negative, and go first."""
    return squares.sign() * squares.abs().sqrt()


def pattern_of(text: str) -> Blocks | NofM | Units:
    """Read a pattern: "1x1" (single weights), "32x32" (rows x columns), "2:4", "heads", "neurons" or "units" (both).

    Raises:
        SecateurError: it cannot be read.
    """
    if found := re.fullmatch(r"(\d+)x(\d+)", text):
        rows, columns = map(int, found.groups())
        if rows and columns:
            return Blocks(rows, columns)
    elif found := re.fullmatch(r"(\d+):(\d+)", text):
        n, m = map(int, found.groups())
        if 0 < n < m:
            return NofM(n, m)
    elif text in ("heads", "neurons", "units"):
        return Units(text)
    raise SecateurError(
        "A pattern is '1x1' (single weights), blocks such as '16x4', '2:4', or whole 'heads', 'neurons' or 'units' "
        f"(both), not '{text}'."
    )


def choose(scores: Sequence[Tensor], sparsity: float, pattern: Pattern, floor: float = 0.0) -> list[Tensor]:
    """Masks, True for weights that stay: the units with the lowest scores of all matrices together go.

    With k = ⌊units · sparsity⌋ and τ the k-th smallest score, k - 1 units go: those below τ and, where scores are
    equal, the first of those at τ. Half precision has many equal ones.

    Args:
        scores: of each matrix's weights, (out, in).
        sparsity: the share of the weights that goes.
        pattern: units of weights.
        floor: each matrix keeps at least this share of its units, its highest; others then lose more.
    """
    floor = floor if pattern.most == 1 else 0.0  # n of m keep their share in any case
    units = [pattern.units(score) for score in scores]
    share = min(1.0, sparsity / pattern.most)
    everything = sum(unit.numel() for unit in units)
    wanted = int(everything * share + 1e-9)
    bound: dict[int, Tensor] = {}
    while True:
        free = [i for i in range(len(units)) if i not in bound]
        gone = sum(int((~stay).sum()) for stay in bound.values())
        k = wanted - gone
        room = sum(units[i].numel() for i in free)
        if k <= 0 or not free:
            masks = {i: torch.ones_like(units[i], dtype=torch.bool) for i in free}
        elif k >= room:
            masks = {i: torch.zeros_like(units[i], dtype=torch.bool) for i in free}
        else:
            masks = dict(zip(free, _without([units[i] for i in free], k), strict=True))
        poor = [i for i in free if int(masks[i].sum()) < least(units[i], floor)]
        if not poor:
            break
        for i in poor:
            keep = least(units[i], floor)
            (bound[i],) = _without([units[i]], units[i].numel() - keep + 1)
    stays = masks | bound
    return [pattern.kept(score, stays[i]) for i, score in enumerate(scores)]


def _without(units: Sequence[Tensor], k: int) -> list[Tensor]:
    """Masks without the k - 1 lowest units of all; units of size 0 are gone already, and may come back."""
    tau = kth_smallest(units, k)
    masks = [unit >= tau for unit in units]
    more = k - 1 - sum(int((~mask).sum()) for mask in masks) if tau else 0
    for unit, mask in zip(units, masks, strict=True):
        if more <= 0:
            break
        at = (unit == tau).nonzero()[:more]
        mask[tuple(at.T)] = False  # of any strides: weights may be transposed
        more -= len(at)
    return masks


def least(units: Tensor, floor: float) -> int:
    """How many units a matrix keeps at least."""
    return int(floor * units.numel() + 1e-9)
