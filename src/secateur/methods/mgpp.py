"""MGPP: one fine-tuning run ends at the wanted sparsity, guided by a mixture-Gaussian prior (arXiv 2411.00969)."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import ClassVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import hub
from secateur.checks import check_shares
from secateur.costs.budget import Constraint, Term
from secateur.edits import Sparsify
from secateur.edits.slice import nonzero_units
from secateur.edits.sparsify import sparsified
from secateur.errors import InvalidBudget, SecateurError
from secateur.run import Job, Outcome
from secateur.sparsity.groups import groups_of, kinds_of
from secateur.sparsity.selection import Blocks, Units, pattern_of
from secateur.sparsity.storage import DTYPES, Values
from secateur.sparsity.weights import prunable, stored_block
from secateur.subnetwork import SubNetwork
from secateur.train import Pruning, PruningSettings, Settings, bf16_pays
from secateur.zeros import slice_zeros

ENTRY = 128  # bytes, at most, of a tensor in the head of a file, besides its name


@dataclass
class Mgpp(PruningSettings):
    """Hyper-parameters of MGPP and of what it is compared with; those of `PruningSettings` are its own too.

    Attributes:
        epochs, lr, batch_size: of the training that prunes.
        beta2, eps: of AdamW: with those of torch, Adam overshoots, and the prior does not hold weights at zero.
        distill: weight of the distance to the dense model's outputs in the loss, from 0 to 1.
        dropout: share of activations set to zero in training; none keeps the model's.
        max_length: tokens beyond this are cut off in training.
        values: how the weights that stay are stored: "fp32", "bf16" or "int8".
    """

    epochs: int = 6
    lr: float = 5e-5
    batch_size: int = 32
    beta2: float = 0.98
    eps: float = 1e-6
    distill: float = 0.0
    dropout: float | None = None
    max_length: int = 128
    values: Values = "fp32"

    name: ClassVar[str] = "mgpp"
    budgets: ClassVar[frozenset[str]] = frozenset({"sparsity", "size"})
    usual_budget: ClassVar[str] = "sparsity>=80%"
    cuts_units: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_shares(self, "distill")
        if not self.lr:
            raise SecateurError("mgpp: lr is above 0: with none nothing is trained.")
        check_shares(self, "dropout", "beta2", below=True)
        if self._cuts and self.values != "fp32":
            raise SecateurError(f"mgpp: with {self.pattern} no zeros are stored, so values says nothing: leave it out.")

    @property
    def _cuts(self) -> bool:
        """Whether whole heads or neurons go."""
        return isinstance(pattern_of(self.pattern), Units)

    def run(self, job: Job) -> Outcome:
        """Train and prune. Heads and neurons that went are cut out, other zeros are stored as one bit each."""
        model = copy.deepcopy(job.model)
        pruning = Pruning(self._aim(model, job.constraints), self)
        trained = job.run.tensors("train", lambda: self._train(model, job, pruning))
        model.load_state_dict(trained)
        nn.Module.to(model, job.model.device)
        kept = nonzero_units(model) if self._cuts else SubNetwork.full(model)
        if self._cuts:
            slice_zeros(model)
            for edit in hub.edits_of(model):  # of an earlier run: its weights were trained further
                if isinstance(edit, Sparsify):
                    there = {n: weight for n, weight in prunable(model).items() if n in edit.kept}
                    hub.attach(model, [sparsified(there, edit.values, edit.block)])
        else:
            pruned = prunable(model, self.weights)
            block = stored_block(model, next(iter(pruned)), self._block)
            hub.attach(model, [sparsified(pruned, self.values, block)])
        model.eval()
        left = float(sum(int(weight.count_nonzero()) for weight in prunable(model).values()))
        counted = job.costs(model) | {"map_params": left, "bytes": float(hub.bytes_on_disk(model))}
        return Outcome(model, hub.edits_of(model), kept, predicted=counted)

    def check(self, model: PreTrainedModel, limits: Sequence[Constraint], rows: int) -> dict[str, int]:
        """Raise what a run would, before it is begun; what it would do.

        Args:
            model: the model to be pruned.
            limits: the budget.
            rows: training examples.

        Returns:
            Steps of training, and how often weights are chosen.

        Raises:
            SecateurError: a pattern, weights, a floor or a schedule that does not fit.
        """
        pattern = pattern_of(self.pattern)
        aim = self._aim(model, limits)
        groups_of(model, prunable(model, self.weights, kinds_of(pattern)), pattern)
        steps = -(-rows // self.batch_size) * self.epochs
        if self.prior:
            self.mixture(self.lr)
        return {"steps": steps, "choices": self.schedule(aim, steps).choices}

    def _aim(self, model: PreTrainedModel, limits: Sequence[Constraint]) -> float:
        """The sparsity of the weights that may go at which all limits hold; found before anything is trained.

        Raises:
            InvalidBudget: one is out of reach, or met without a further zero.
        """
        pattern = pattern_of(self.pattern)
        weights = prunable(model, self.weights, kinds_of(pattern))
        count = sum(weight.numel() for weight in weights.values())
        most = pattern.most if pattern.most < 1 else 1 - self.floor
        ways = {"sparsity": self._sparsity_wanted, "size": self._size_wanted}
        wanted = max(ways[limit.kind](model, limit, weights, most) for limit in limits)
        if isinstance(pattern, Units) or wanted > most - 1e-9:  # units reach what is asked for
            return min(wanted, most)
        return min(wanted + 2 * pattern.size / count, most)  # the unit at the threshold stays: one more is asked for

    def _sparsity_wanted(
        self, model: PreTrainedModel, limit: Constraint, weights: dict[str, nn.Parameter], most: float
    ) -> float:
        """The sparsity of some weights for one of all maps."""
        share = cast(Term, limit.term).share
        count, everything = (sum(w.numel() for w in each.values()) for each in (weights, prunable(model)))
        wanted = (share * everything - _held(model, weights)) / count
        if wanted <= 0:
            raise InvalidBudget(f"sparsity>={share:g} is met by the zeros that other weights keep: ask for more.")
        if wanted > most + 1e-9:
            nearest = math.floor(1e4 * share * most / wanted) / 1e4
            raise InvalidBudget(
                f"sparsity>={share:g} is out of reach: of the {count:,} weights that may go, a share of {most:g} can "
                f"(see weights, pattern and floor). The nearest feasible budget is sparsity>={nearest:g}."
            )
        return wanted

    def _size_wanted(
        self, model: PreTrainedModel, limit: Constraint, weights: dict[str, nn.Parameter], most: float
    ) -> float:
        """The sparsity of some weights at which the file has the bytes asked for; other weights count as dense."""
        term, full = cast(Term, limit.term), limit.cost.of(SubNetwork.full(model))
        dense = sum(weight.numel() * weight.element_size() for weight in weights.values())
        if self._cuts:
            fixed, kept = full - dense, float(dense)
        else:
            rows, columns = self._block
            masks = sum(-(-weight.numel() // (8 * rows * columns)) for weight in weights.values())
            scales = sum(4 * len(weight) for weight in weights.values()) if self.values == "int8" else 0
            named = sum(2 * (len(name) + ENTRY) for name in weights)
            fixed = full - dense + masks + scales + named
            kept = float(DTYPES[self.values].itemsize * sum(weight.numel() for weight in weights.values()))
        wanted = 1 - (limit.limit - fixed) / kept
        if wanted <= 0:
            raise InvalidBudget(f"{term} is met by values={self.values!r} without a zero: ask for less.")
        if wanted > most + 1e-9:
            least = fixed + (1 - most) * kept
            raise InvalidBudget(
                f"{term} is out of reach: with a sparsity of {most:g} the file has {term.show(least, full)} (see "
                f"values, weights, pattern and floor). The nearest feasible budget is {term.at_least(least, full)}."
            )
        return wanted

    @property
    def _block(self) -> tuple[int, int]:
        """Outputs and inputs that are zero together."""
        pattern = pattern_of(self.pattern)
        return (pattern.rows, pattern.columns) if isinstance(pattern, Blocks) else (1, 1)

    def _train(self, model: PreTrainedModel, job: Job, pruning: Pruning) -> dict[str, Tensor]:
        """Weights after the training that prunes."""
        settings = Settings(
            self.epochs,
            self.lr,
            self.batch_size,
            self.max_length,
            warmup=0.0,
            weight_decay=0.0,
            seed=job.seed,
            dropout=self.dropout,
            bf16=bf16_pays(),
            beta2=self.beta2,
            eps=self.eps,
        )
        return job.trained(model, settings, [pruning], job.distillation(self.distill))


def _held(model: PreTrainedModel, weights: Collection[str]) -> int:
    """Zeros of an earlier run that stay, because other weights are asked for."""
    names = {name for edit in hub.edits_of(model) if isinstance(edit, Sparsify) for name in edit.kept} - set(weights)
    return sum(int((weight == 0).sum()) for name, weight in prunable(model).items() if name in names)
