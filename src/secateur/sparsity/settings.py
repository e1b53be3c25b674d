"""What decides which weights go while a model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from secateur.checks import check_fields, check_shares
from secateur.errors import SecateurError
from secateur.sparsity.prior import MixturePrior, spike_for
from secateur.sparsity.schedule import CubicSchedule
from secateur.sparsity.selection import pattern_of

Score = Literal["magnitude", "platon", "movement"]
RATES = 1.5  # w* of a single weight over the peak learning rate; 1 to 3 in the authors' settings


@dataclass
class PruningSettings:
    """What decides which weights go.

    Attributes:
        score: what weights are ranked by: "magnitude"; "platon" (Zhang et al., ICML 2022), the averaged |w·gradient|
            times its uncertainty; "movement" (Sanh et al., NeurIPS 2020), how much training moves a weight away from
            zero.
        prior: whether MGPP's prior pulls on the weights; without it a score is the published method of that name.
        pattern: what goes together: "1x1" (single weights), blocks such as "16x4", "2:4", or whole "heads", "neurons"
            or "units" (both), which can be cut out afterwards (`slice_zeros`).
        weights: regular expression of parameter names; the linear maps of all layers if None.
        floor: share of each matrix that stays in any case.
        initial: sparsity at the first choice.
        before: share of the steps before the first choice.
        after: share of the steps after the last choice, with the mask as it is.
        interval: steps between choices.
        slab_share: λ of the prior: probability of the slab.
        slab_last: share of λ that annealing ends at.
        spike: v0, variance of the spike; None takes the one whose w*, of single weights, is 1.5 times the peak learning
            rate, so that the prior holds weights at zero whatever the rate.
        slab: v1, variance of the slab.
        anneal: "slab" lowers λ while pruning, "strength" raises the prior before pruning starts, or "none".
        memory: β1 of "platon".
        doubt: β2 of "platon".
    """

    score: Score = "magnitude"
    prior: bool = True
    pattern: str = "1x1"
    weights: str | None = None
    floor: float = 0.01
    initial: float = 0.3
    before: float = 0.1
    after: float = 0.1
    interval: int = 10
    slab_share: float = 0.1
    slab_last: float = 0.001
    spike: float | None = None
    slab: float = 0.1
    anneal: Literal["slab", "strength", "none"] = "slab"
    memory: float = 0.85
    doubt: float = 0.95

    name: ClassVar[str] = "pruning"

    def __post_init__(self) -> None:
        check_fields(self)
        check_shares(self, "floor", "initial", "before", "after", "slab_last", "memory", "doubt")
        if self.slab_last == 0:
            raise SecateurError(f"{self.name}: slab_last is above 0: the slab keeps a share.")
        if self.before + self.after >= 1:
            raise SecateurError(f"{self.name}: before and after leave no room to prune: together they are below 1.")
        pattern_of(self.pattern)
        if self.prior:
            self.mixture(5e-5)

    def schedule(self, final: float, steps: int) -> CubicSchedule:
        """The schedule of a run of so many steps.

        Raises:
            SecateurError: there is no room for it.
        """
        end = steps - 1 - int(self.after * steps)
        return CubicSchedule(int(self.before * steps), end, self.interval, min(self.initial, final), final)

    def mixture(self, lr: float, slab_share: float | None = None, group: int = 1) -> MixturePrior:
        """The prior of a group of weights, with a peak learning rate and a probability of the slab; λ if None."""
        spike = spike_for(RATES * lr, self.slab_share, self.slab) if self.spike is None else self.spike
        return MixturePrior(self.slab_share if slab_share is None else slab_share, spike, self.slab, group)
