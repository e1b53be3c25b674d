"""Budgets as text: `"macs<=60%"`, `"latency<=12ms,size<=20MB"`."""

from __future__ import annotations

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from secateur.costs.analytic import LinearCost, bits, encoder_params, file_bytes, macs, map_params, params
from secateur.costs.latency import LatencyTable, latency_table
from secateur.costs.memory import PeakMemory, peak_memory
from secateur.errors import InvalidBudget
from secateur.subnetwork import SubNetwork

Cost = LinearCost | LatencyTable | PeakMemory

_COUNT = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}
_BYTES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2.0**10, "MiB": 2.0**20, "GiB": 2.0**30}
_TIME = {"us": 1e-3, "ms": 1.0, "s": 1e3}

UNITS: dict[str, dict[str, float]] = {
    "macs": _COUNT,
    "params": _COUNT,
    "encoder_params": _COUNT,
    "size": _BYTES,
    "latency": _TIME,
    "memory": _BYTES,
    "speedup": {"": 1.0, "x": 1.0},
    "sparsity": {"": 1.0},
    "bits": {"": 1.0},
}
"""For each kind of budget, the units it may be written in and what they are worth (latency in milliseconds)."""

EXAMPLES = {
    "macs": "macs<=2.5G",
    "params": "params<=15M",
    "encoder_params": "encoder_params<=7M",
    "size": "size<=20MB",
    "latency": "latency<=12ms",
    "memory": "memory<=60MB",
    "speedup": "speedup>=3",
    "sparsity": "sparsity>=90%",
    "bits": "bits<=1",
}
LOWER = frozenset({"speedup", "sparsity"})
"""Kinds of budget that set a least instead of a most."""
WHOLE = frozenset({"speedup", "bits"})
"""Kinds of budget that are no share."""

_NUMBER = r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?"
_TERM = re.compile(rf"\w+\s*(?P<sign>[<>]=)\s*(?P<value>{_NUMBER})\s*(?P<unit>%|[a-z]*)", re.IGNORECASE)


@dataclass(frozen=True)
class Term:
    """One limit as the user wrote it: `Term("latency", 12.0, "ms")` or `Term("macs", 60.0, "%")`."""

    kind: str
    value: float
    unit: str

    @property
    def counts(self) -> str:
        """The kind of cost that the limit is on: a speed-up is one of MACs, a sparsity leaves weights of the maps."""
        return {"speedup": "macs", "sparsity": "map_params"}.get(self.kind, self.kind)

    def limit(self, full: float) -> float:
        """The limit in units, bytes or milliseconds, for a model that costs `full`."""
        if self.kind == "speedup":
            return full / self.value
        if self.kind == "sparsity":
            return full * (1 - self.share)
        return self.value / 100 * full if self.unit == "%" else self.value * UNITS[self.kind][self.unit]

    @property
    def share(self) -> float:
        """The value as a share of 1."""
        return self.value / 100 if self.unit == "%" else self.value

    def at_least(self, cost: float, full: float) -> Term:
        """The smallest limit of three digits, in this term's unit, that a cost still meets."""
        if self.kind == "speedup":
            return Term(self.kind, math.floor(100 * full / cost) / 100, self.unit)
        exact = cost / self._scale(full)
        step = 10.0 ** (math.floor(math.log10(exact)) - 2) if exact > 0 else 1.0
        steps = math.ceil(exact / step)
        while (term := Term(self.kind, float(f"{steps * step:.12g}"), self.unit)).limit(full) < cost:
            steps += 1  # the division above rounded down
        return term

    def show(self, cost: float, full: float) -> str:
        """A cost in this term's unit."""
        if self.kind == "speedup":
            return f"{full / cost:.4g}{self.unit}"
        return f"{cost / self._scale(full):.4g}{self.unit}"

    def _scale(self, full: float) -> float:
        return full / 100 if self.unit == "%" else UNITS[self.kind][self.unit]

    def __str__(self) -> str:
        return f"{self.kind}{'>=' if self.kind in LOWER else '<='}{self.value:.12g}{self.unit}"


@dataclass(frozen=True)
class Budget:
    """Limits that hold together."""

    terms: tuple[Term, ...]

    @classmethod
    def parse(cls, text: str) -> Budget:
        """Read a budget.

        Args:
            text: limits joined with commas, each `kind<=amount`. Kinds: macs, params, encoder_params (amounts such as
                15M or 2.5G), size and memory (20MB, 20MiB), latency (12ms); or a share of the model as given (60%). And
                `speedup>=3`: at most a third of the model's MACs; `sparsity>=90%`: zeros among the weights of the
                layers' linear maps; `bits<=1`: of the inputs of the layers' products.

        Raises:
            InvalidBudget: the text cannot be read, a kind is unknown or given twice, or a share would cut nothing.
        """
        pieces = [piece.strip() for piece in text.split(",")]
        if not any(pieces):
            raise InvalidBudget("The budget is empty: write for example 'macs<=60%' or 'latency<=12ms'.")
        if not all(pieces):
            raise InvalidBudget(f"The budget '{text}' has an empty part: join limits with single commas.")
        terms = tuple(_term(piece) for piece in pieces)
        kinds = [term.kind for term in terms]
        for kind in kinds:
            if kinds.count(kind) > 1:
                raise InvalidBudget(f"The budget limits {kind} twice: keep the stricter one.")
        return cls(terms)

    @property
    def kinds(self) -> frozenset[str]:
        """What the budget limits."""
        return frozenset(term.kind for term in self.terms)

    def describe(self) -> str:
        """The budget as canonical text, which `parse` reads back."""
        return ",".join(map(str, self.terms))

    def check_kinds(self, taken: Collection[str], method: str) -> None:
        """Raise `InvalidBudget` if the budget limits something that a method cannot aim at."""
        for term in self.terms:
            if term.kind not in taken:
                raise InvalidBudget(f"{method} takes no '{term.kind}' budget: use {', '.join(sorted(taken))}.")


@dataclass(frozen=True)
class Constraint:
    """A limit resolved on one model: `cost.of(sub) <= limit`.

    Attributes:
        kind: what is limited.
        limit: in multiply-adds, parameters, bytes or milliseconds.
        cost: the cost of a sub-network of that model.
        term: the limit as the user wrote it, for messages.
    """

    kind: str
    limit: float
    cost: Cost
    term: Term | None = None

    @property
    def summed(self) -> LinearCost | LatencyTable:
        """The cost, where it is a sum over blocks.

        Raises:
            InvalidBudget: it is none.
        """
        if isinstance(self.cost, PeakMemory):
            raise InvalidBudget(f"'{self.kind}' is no sum over blocks: only a search (nas) can aim at it.")
        return self.cost

    def met_by(self, sub: SubNetwork) -> bool:
        return self.cost.of(sub) <= self.limit

    def infeasible(self, smallest: float, full: float) -> InvalidBudget:
        """The error that says how far this model can be cut: `smallest` is its cost with one head and no neurons."""
        unit = {"latency": "ms", "size": "B", "memory": "B"}.get(self.kind, "")
        term = self.term or Term(self.kind, self.limit, unit)
        if smallest >= full:
            cost = term.show(full, full)
            return InvalidBudget(f"{term} cannot be met: this model costs {cost} and has nothing left to cut.")
        return InvalidBudget(
            f"{term} cannot be met: with one head and no neurons this model still costs {term.show(smallest, full)}. "
            f"The nearest feasible budget is {term.at_least(smallest, full)}."
        )


def constraints(
    budget: Budget, model: nn.Module, batch: int = 1, tokens: int = 128, *, units: bool = True, loose: bool = False
) -> list[Constraint]:
    """Resolve a budget on a model; shares are shares of the model as given.

    Args:
        budget: the limits.
        model: the model to be cut.
        batch: examples per pass, for macs and latency.
        tokens: tokens per example, for macs and latency.
        units: whether heads and neurons are what will be cut, which bounds what is feasible.
        loose: whether the model as given may meet all limits.

    Raises:
        InvalidBudget: a limit is below what this model can be cut to (the message states the nearest feasible one), or
            the model as given meets all of them.
    """
    full = SubNetwork.full(model)
    resolved = []
    for term in budget.terms:
        cost = cost_of(term.counts, model, batch, tokens)
        constraint = Constraint(term.kind, term.limit(cost.of(full)), cost, term)
        if units:
            check_feasible(constraint, full)
        resolved.append(constraint)
    if not loose and all(constraint.met_by(full) for constraint in resolved):
        # no share is met by the full model, so every term here is absolute
        has = ", ".join(f"{t.kind} {t.show(c.cost.of(full), 1.0)}" for t, c in zip(budget.terms, resolved, strict=True))
        raise InvalidBudget(f"The model as given meets {budget.describe()} ({has}): nothing to cut, ask for less.")
    return resolved


def check_feasible(constraint: Constraint, full: SubNetwork) -> None:
    """Raise `InvalidBudget` if even the smallest sub-network exceeds the limit."""
    smallest = smallest_cost(constraint.cost, full)
    if smallest > constraint.limit:
        raise constraint.infeasible(smallest, constraint.cost.of(full))


def smallest_cost(cost: Cost, full: SubNetwork) -> float:
    """Cost with everything prunable removed but the cheapest single head."""
    if isinstance(cost, PeakMemory):
        heads, neurons = ([0 * mask for mask in masks] for masks in full.masks())
        return cost.of(SubNetwork.from_masks(heads, neurons))
    one_head = [cost.block("heads", index, [1])[0] for index, mask in enumerate(full.heads) if mask]
    return cost.fixed + min(one_head, default=0.0)


def cost_of(kind: str, model: nn.Module, batch: int = 1, tokens: int = 128) -> Cost:
    """The cost of a model's sub-networks that a kind of budget limits (`Term.counts`)."""
    if kind == "macs":
        return macs(model, batch, tokens)
    if kind == "latency":
        return latency_table(model, batch, tokens)
    if kind == "memory":
        return peak_memory(model, batch, tokens)
    counters = {
        "params": params,
        "encoder_params": encoder_params,
        "map_params": map_params,
        "size": file_bytes,
        "bits": bits,
    }
    return counters[kind](model)


def _term(piece: str) -> Term:
    kind = re.split(r"[^\w]", piece, maxsplit=1)[0]
    if kind.lower() not in UNITS:
        raise InvalidBudget(f"Unknown budget '{piece}': it limits one of {', '.join(UNITS)}, as in 'macs<=60%'.")
    kind = kind.lower()
    match = _TERM.fullmatch(piece)
    if match is None or match["sign"] != (">=" if kind in LOWER else "<="):
        share = "" if kind in LOWER | WHOLE else f" or a share, '{kind}<=60%'"
        raise InvalidBudget(f"'{piece}' cannot be read: write '{EXAMPLES[kind]}'{share}.")
    value, unit = float(match["value"]), _unit(kind, match["unit"], piece)
    if value <= 0 and kind in LOWER:
        raise InvalidBudget(f"'{piece}' would cut nothing: the limit must be above 0, as in '{EXAMPLES[kind]}'.")
    if value <= 0:
        raise InvalidBudget(f"'{piece}' leaves nothing: the limit must be above 0, as in '{EXAMPLES[kind]}'.")
    if kind == "speedup" and value <= 1:
        raise InvalidBudget(f"'{piece}' would cut nothing: a speed-up is above 1, as in '{EXAMPLES[kind]}'.")
    if kind == "sparsity" and Term(kind, value, unit).share >= 1:
        meant = f": did you mean '{kind}>={value:g}%'?" if 1 < value < 100 else ""
        raise InvalidBudget(f"'{piece}' leaves nothing: a sparsity is below 1, as in '{EXAMPLES[kind]}'{meant}.")
    if unit == "%" and value >= 100:
        raise InvalidBudget(f"'{piece}' would cut nothing: shares are below 100%, as in '{kind}<=60%'.")
    return Term(kind, value, unit)


def _unit(kind: str, text: str, piece: str) -> str:
    if text == "%" and kind not in WHOLE:
        return "%"
    for unit in UNITS[kind]:
        if unit.lower() == text.lower():
            return unit
    units = ", ".join(unit for unit in UNITS[kind] if unit)
    share = "" if kind in WHOLE else " or %"
    raise InvalidBudget(f"'{piece}' needs a unit of {kind} ({units}{share}), as in '{EXAMPLES[kind]}'.")
