"""How sparse, when: the cubic schedule, and the two ways in which the prior is annealed."""

from __future__ import annotations

from dataclasses import dataclass

from secateur.errors import SecateurError


@dataclass(frozen=True)
class CubicSchedule:
    """s(t) = s_f + (s_i - s_f) (1 - (t - t_i)/(t_f - t_i))³ between t_i and t_f (Zhu & Gupta, arXiv 1710.01878).

    Attributes:
        start: t_i, the first step that prunes, counted from 0.
        end: t_f, the last step that chooses weights; the mask stays as it is from then on.
        interval: steps between choices.
        initial: s_i, sparsity at t_i.
        final: s_f.
    """

    start: int
    end: int
    interval: int
    initial: float
    final: float

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end:
            raise SecateurError(
                f"The pruning schedule has no room: it would begin at step {self.start} and end at step {self.end}. "
                "Train for more epochs, or shorten the phases before and after pruning."
            )
        if not 0 < self.final < 1:
            raise SecateurError(f"A sparsity lies between 0 and 1, not at {self.final:g}.")
        if not 0 <= self.initial <= self.final:
            raise SecateurError(
                f"The first sparsity lies between 0 and the last one, {self.final:g}, not at {self.initial:g}."
            )
        if self.interval < 1:
            raise SecateurError("The steps between two choices of weights are a whole number from 1.")

    def done(self, step: int) -> float:
        """The share of the pruning window that has passed, from 0 to 1."""
        return min(1.0, max(0.0, (step - self.start) / (self.end - self.start)))

    def sparsity(self, step: int) -> float:
        """s(t)."""
        if step < self.start:
            return 0.0
        return self.final + (self.initial - self.final) * (1 - self.done(step)) ** 3

    def chooses(self, step: int) -> bool:
        """Whether weights are chosen after this step: at t_i, at multiples of the interval, and at t_f."""
        between = self.start < step < self.end and step % self.interval == 0
        return step in (self.start, self.end) or between

    @property
    def choices(self) -> int:
        """How often weights are chosen."""
        return 2 + (self.end - 1) // self.interval - self.start // self.interval


def annealed_slab(slab_share: float, last: float, schedule: CubicSchedule, step: int) -> float:
    """λ(t): constant until pruning starts, then linearly down to `last` · λ at its end."""
    return slab_share * (last + (1 - last) * (1 - schedule.done(step)))


def annealed_strength(begin: int, end: int, step: int) -> float:
    """η(t): 0 before `begin`, 1 from `end` on, linear between: the prior's gradient is multiplied by it."""
    if step >= end:
        return 1.0
    return max(0.0, (step - begin) / (end - begin))
