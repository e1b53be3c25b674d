"""PTF: Fisher mask search, rearrangement and tuning (Kwon et al., NeurIPS 2022, arXiv 2204.09656)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from secateur.checks import check_fields
from secateur.prune import Tune, pack_units, prune, tune_mode, unpack_units
from secateur.run import STRUCTURED_BUDGETS, USUAL_BUDGET, Job, Outcome
from secateur.scores.fisher import fisher_scores
from secateur.scores.trajectory import UnitGradients


@dataclass
class Ptf:
    """Hyper-parameters of PTF, with the published defaults.

    Attributes:
        batches, batch_size: labelled calibration data, 64 × 32 = 2,048 examples.
        rearrange: swap units within each layer by the block-diagonal Fisher (stage two).
        tune: "scale" rescales the kept units by least squares (stage three), "none" does not, "full" solves for the
            whole output projections instead. True and False stand for "scale" and "none".
        multiple: neurons per layer are kept in multiples of this many; 1 is the published search.
        head_rate: factor on head scores.
    """

    batches: int = 64
    batch_size: int = 32
    rearrange: bool = True
    tune: Tune | bool = "scale"
    multiple: int = 64
    head_rate: float = 1.0

    name: ClassVar[str] = "ptf"
    budgets: ClassVar[frozenset[str]] = STRUCTURED_BUDGETS
    usual_budget: ClassVar[str] = USUAL_BUDGET
    cuts_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self, job: Job) -> Outcome:
        """Mask gradients, search, rearrangement, tuning, slice."""
        data = job.calibration(self.batches, self.batch_size, labels=True)

        def score() -> dict[str, Tensor]:
            _, gradients = fisher_scores(job.model, data, progress=job.show)
            return pack_units("gradient", gradients.heads, gradients.neurons)

        gradients = UnitGradients(*unpack_units("gradient", job.run.tensors("score", score)))
        return prune(
            job,
            gradients.scores(),
            gradients=gradients if self.rearrange else None,
            tune=tune_mode(self.tune, "scale"),
            multiple=self.multiple,
            head_rate=self.head_rate,
            calibration=lambda: data,
        )
