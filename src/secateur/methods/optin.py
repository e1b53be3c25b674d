"""OPTIN: one-shot pruning by trajectory importance (Khaki & Plataniotis, ICLR 2024, arXiv 2403.17921)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal

from torch import Tensor

from secateur.checks import check_fields
from secateur.errors import SecateurError
from secateur.prune import Tune, pack_units, prune, search, tune_mode, unpack_units
from secateur.run import STRUCTURED_BUDGETS, USUAL_BUDGET, Job, Outcome
from secateur.scores.exact import exact_scores
from secateur.scores.probes import probe_scores
from secateur.scores.trajectory import (
    TrajectoryScores,
    UnitGradients,
    combine,
    combine_gradients,
    near_cut,
    refined,
)
from secateur.subnetwork import SubNetwork, UnitScores


@dataclass
class Optin:
    """Hyper-parameters of OPTIN; labels are never used.

    Attributes:
        scorer: "probe" estimates every unit from a few backward passes; "exact" masks every unit in turn (the
            reference;
            minutes to hours).
        lambda_c: weight λ_c of the output term (KL, or the squared difference for one output) beside the trajectory
            term.
        temperature: T of the KL.
        tokens: K, real tokens per batch, whole sequences.
        probes: random directions per batch of the probe scorer; the error of a score falls with their square root.
        normalise: divide each layer's distance by ||G||_F², so that layers weigh alike.
        own_layer: also count a unit's effect on its own layer's feature map.
        batches, batch_size: unlabelled calibration data.
        refine: share of the units nearest to the cut that are scored exactly afterwards.
        head_rate: factor on head scores, which sets how many neurons a head is worth.
        rearrange: swap units within each layer so that the joint effect of the removed ones is least.
        tune: how the kept units make up for the removed ones, from unlabelled data: "full" solves for the kept part of
            the output projections by least squares, "scale" for one factor per unit (as PTF), "none" changes no weight.
            True and False stand for "full" and "none".
        tune_batches: calibration batches for tuning.
        multiple: neurons per layer are kept in multiples of this many.
        bf16: run the probe scorer in bfloat16.
    """

    scorer: Literal["probe", "exact"] = "probe"
    lambda_c: float = 10.0
    temperature: float = 4.0
    tokens: int = 768
    probes: int = 8
    normalise: bool = True
    own_layer: bool = False
    batches: int = 4
    batch_size: int = 32
    refine: float = 0.0
    head_rate: float = 1.0
    rearrange: bool = True
    tune: Tune | bool = "full"
    tune_batches: int = 16
    multiple: int = 64
    bf16: bool = False

    name: ClassVar[str] = "optin"
    budgets: ClassVar[frozenset[str]] = STRUCTURED_BUDGETS
    usual_budget: ClassVar[str] = USUAL_BUDGET
    cuts_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        if self.refine > 1:
            raise SecateurError(f"refine is a share of the units, from 0 to 1, not {self.refine}.")

    def run(self, job: Job) -> Outcome:
        """Score every unit once against the intact model, search, repair if asked, slice."""
        data = job.calibration(self.batches, self.batch_size)
        scores = unpack_scores(job.run.tensors("score", lambda: pack_scores(self._score(job, data))))
        if self.refine:
            scores = unpack_scores(job.run.tensors("refine", lambda: pack_scores(self._refine(job, data, scores))))
        return prune(
            job,
            combine(scores, self.lambda_c),
            gradients=combine_gradients(scores, self.lambda_c) if self.rearrange else None,
            tune=tune_mode(self.tune, "full"),
            multiple=self.multiple,
            head_rate=self.head_rate,
            calibration=lambda: job.calibration(self.tune_batches, self.batch_size),
        )

    def _score(self, job: Job, data: list[dict[str, Tensor]]) -> TrajectoryScores:
        """Scores of every unit; rearrangement needs the probes' directions also where the scores are exact."""
        if self.scorer == "probe":
            return self._probes(job, data)
        scores = self._exact(job, data)
        return _with_gradients_of(self._probes(job, data), scores) if self.rearrange else scores

    def _probes(self, job: Job, data: list[dict[str, Tensor]]) -> TrajectoryScores:
        return probe_scores(
            job.model,
            data,
            probes=self.probes,
            tokens=self.tokens,
            temperature=self.temperature,
            normalise=self.normalise,
            own_layer=self.own_layer,
            keep_gradients=self.rearrange,
            bf16=self.bf16,
            seed=job.seed,
            progress=job.show,
        )

    def _exact(self, job: Job, data: list[dict[str, Tensor]], units: SubNetwork | None = None) -> TrajectoryScores:
        return exact_scores(
            job.model,
            data,
            tokens=self.tokens,
            temperature=self.temperature,
            normalise=self.normalise,
            own_layer=self.own_layer,
            seed=job.seed,
            units=units,
            progress=job.show,
        )

    def _refine(self, job: Job, data: list[dict[str, Tensor]], scores: TrajectoryScores) -> TrajectoryScores:
        ranked = combine(scores, self.lambda_c)
        first = search(job, ranked, multiple=self.multiple, head_rate=self.head_rate)
        exact = self._exact(job, data, near_cut(ranked, first, self.refine))
        return _with_gradients_of(scores, refined(scores, exact))


def _with_gradients_of(source: TrajectoryScores, scores: TrajectoryScores) -> TrajectoryScores:
    return replace(scores, trajectory_gradients=source.trajectory_gradients, output_gradients=source.output_gradients)


def pack_scores(scores: TrajectoryScores) -> dict[str, Tensor]:
    """Scores as named tensors, as a run keeps them."""
    parts = {
        "trajectory": scores.trajectory,
        "output": scores.output,
        "trajectory_gradient": scores.trajectory_gradients,
        "output_gradient": scores.output_gradients,
    }
    packed: dict[str, Tensor] = {}
    for name, part in parts.items():
        if part is not None:
            packed |= pack_units(name, part.heads, part.neurons)
    return packed


def unpack_scores(packed: dict[str, Tensor]) -> TrajectoryScores:
    """Inverse of `pack_scores`."""

    def gradients(name: str) -> UnitGradients | None:
        return UnitGradients(*unpack_units(name, packed)) if f"{name}.neurons.0" in packed else None

    return TrajectoryScores(
        UnitScores(*unpack_units("trajectory", packed)),
        UnitScores(*unpack_units("output", packed)),
        gradients("trajectory_gradient"),
        gradients("output_gradient"),
    )
