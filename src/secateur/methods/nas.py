"""NAS: one super-network, searched for the sub-network that a budget allows (Klein et al., TMLR 2024)."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar, Literal

from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import hub
from secateur.alone import Alone
from secateur.checks import check_fields, check_shares
from secateur.cluster import Judge, Workers
from secateur.costs.analytic import LinearCost, bypassed, encoder_params, file_bytes, params
from secateur.costs.budget import Constraint, Cost, cost_of
from secateur.costs.latency import LatencyTable
from secateur.errors import InvalidBudget, SecateurError
from secateur.families import sites
from secateur.optimize.halving import Halving
from secateur.optimize.points import DEAR, ERROR, OBJECTIVES, Point, best_of, front_of
from secateur.optimize.samplers import Name, Sampler, sampler
from secateur.optimize.spaces import Kind, Space, Values
from secateur.ordering import sort_units
from secateur.progress import progress
from secateur.prune import Weights, pack_units, taken, unpack_units
from secateur.run import STRUCTURED_BUDGETS, USUAL_BUDGET, Job, Outcome
from secateur.scores.fisher import fisher_scores
from secateur.subnetwork import SubNetwork, UnitScores
from secateur.tasks import batches, check_labels, held_out
from secateur.tasks.batching import token_limit
from secateur.train import Settings, bf16_pays
from secateur.train.supernet import Strategy, SuperNetwork

MOST = 2048
"""Rows, at most, that candidates are judged by."""


@dataclass
class Searched:
    """A super-network and what was found in it.

    Attributes:
        model: the super-network, sorted and trained.
        scores: of its units, in their order; None if they were not sorted.
        points: what was evaluated, each sub-network once.
        costs: what points are counted by.
        weights: of points of the front that were trained by themselves, by their number.
    """

    model: PreTrainedModel
    scores: UnitScores | None
    points: list[Point]
    costs: dict[str, Cost]
    weights: dict[int, Weights] = field(default_factory=dict)


@dataclass
class Nas:
    """Hyper-parameters of the search for a sub-network.

    Attributes:
        space: "small": one number of layers, heads and neurons; "medium": heads and neurons of each layer; "layer":
            which layers stay; "large": which heads and neurons stay.
        strategy: what a step of the super-network's training trains (`train.supernet.SuperNetwork`); "alone" trains
            candidates each by itself instead, the best for longer (`optimize.halving`), and none trains nothing, for a
            model that is a super-network already.
        order: sort heads and neurons by their Fisher information first, so that the first ones are the best ones.
        sampler: who proposes candidates: "random", "local", "evolution", "nsga2", "tpe" or "gp".
        evaluations: candidates that are judged, each with those of its first layers alone, which cost no more.
        workers: candidates judged at a time: with more than one by processes of a Ray cluster (`secateur[ray]`), which
            hold the super-network once each; the sampler is then told so many at a time.
        stratified: draws are spread over sizes, in "small" and "medium".
        holdout: share of the training rows that candidates are judged by (2,048 at most), so that validation rows stay
            unseen; 0 judges by validation.
        epochs, lr, batch_size: of the super-network's training.
        subnetworks: random sub-networks of a step; none takes the paper's 1 for "random" and "linear", 2 for others.
        temperature: T of in-place distillation.
        multiple: neurons per layer are kept in multiples of this many, in "small" and "medium".
        batches: of 32 labelled examples that Fisher information is taken from.
        max_length: tokens beyond this are cut off in training.
        dropout: share of activations set to zero in training; none keeps the model's.
    """

    space: Kind = "small"
    strategy: Strategy | Literal["alone"] | None = "one-shot"
    order: bool = True
    sampler: Name = "evolution"
    evaluations: int = 100
    workers: int = 1
    stratified: bool = True
    holdout: float = 0.2
    epochs: int = 5
    lr: float = 2e-5
    batch_size: int = 32
    subnetworks: int | None = None
    temperature: float = 10.0
    multiple: int = 64
    batches: int = 16
    max_length: int = 128
    dropout: float | None = None

    name: ClassVar[str] = "nas"
    budgets: ClassVar[frozenset[str]] = STRUCTURED_BUDGETS | {"memory"}
    usual_budget: ClassVar[str] = USUAL_BUDGET
    cuts_units: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        check_shares(self, "holdout", "dropout", below=True)
        if not self.temperature:
            raise SecateurError("nas: temperature is above 0.")
        if self.strategy == "alone" and self.workers > 1:
            raise SecateurError(
                "nas: candidates that are trained alone are trained here, one by one: leave workers at 1."
            )

    def run(self, job: Job) -> Outcome:
        """Sort, train the super-network, search it, cut out the best that meets the budget."""
        limits = {limit.kind: limit.limit for limit in job.constraints}
        found = self.search(job, (ERROR, *limits))
        best = best_of(found.points, limits)
        if best is None:
            nearest = min(found.points, key=lambda point: point.beyond(limits))
            reached = ", ".join(f"{kind} {nearest.costs[kind]:.4g}" for kind in limits)
            raise InvalidBudget(
                f"None of {len(found.points)} sub-networks meets the budget (the nearest has {reached}): raise "
                "evaluations, or allow more."
            )
        model = taken(found.model, best, found.weights)
        full = SubNetwork.full(model)
        counted = {"encoder_params": encoder_params(model).of(full), "bytes": file_bytes(model).of(full)}
        names = {"latency": "latency_ms", "memory": "memory"}
        dear = {name: best.costs[kind] for kind, name in names.items() if kind in best.costs}
        return Outcome(model, hub.edits_of(model), best.sub, found.scores, job.costs(model) | counted | dear)

    def search(self, job: Job, objectives: Sequence[str]) -> Searched:
        """Sort, train the super-network, and evaluate candidates that lessen some objectives within the job's limits.

        Args:
            job: the model, its task, and limits that a candidate should keep.
            objectives: of `optimize.points.OBJECTIVES`.
        """
        space = Space.of(self.space, sites(job.model), self.multiple)
        task = check_labels(job.task, job.model)
        if self.holdout:
            task = held_out(task, self.holdout, MOST, job.seed)
        job = replace(job, task=task)
        model = copy.deepcopy(job.model)
        scores = self._sorted(model, job) if self.order else None
        if self.strategy is not None and self.strategy != "alone":
            model.load_state_dict(job.run.tensors("train", partial(self._train, model, job, space, self.strategy)))
            nn.Module.to(model, job.model.device)
        costs = self._costs(job, objectives)
        asked = sampler(
            self.sampler,
            space,
            len(objectives),
            seed=job.seed,
            draw=self._draw(model, space),
            limited=bool(job.constraints),
        )
        if self.strategy == "alone":
            return Searched(model, scores, *self._each_trained(model.eval(), job, space, asked, objectives, costs))
        return Searched(model, scores, self._searched(model.eval(), job, space, asked, objectives, costs), costs)

    def check(self, model: PreTrainedModel, limits: Sequence[Constraint], rows: int) -> dict[str, int]:
        """Raise what a run would, before it is begun; the steps of its training and the candidates it judges.

        Args:
            model: the model to be searched.
            limits: the budget.
            rows: training examples.
        """
        space = Space.of(self.space, sites(model), self.multiple)
        sampler(self.sampler, space, 1 + len(limits))
        kept = rows - round(min(self.holdout * rows, MOST))
        epochs = 0 if self.strategy is None else self.epochs
        if self.strategy == "alone":
            epochs = Halving(self.epochs).epochs(self.evaluations)
        return {"steps": -(-kept // self.batch_size) * epochs, "evaluations": self.evaluations}

    def _sorted(self, model: PreTrainedModel, job: Job) -> UnitScores:
        """Sort the units of a copy of the job's model; their scores in the new order."""

        def score() -> dict[str, Tensor]:
            found, _ = fisher_scores(model, job.calibration(self.batches, 32, labels=True), progress=job.show)
            return pack_units("score", found.heads, found.neurons)

        scores = UnitScores(*unpack_units("score", job.run.tensors("order", score)))
        return sort_units(model, scores)

    def _train(self, model: PreTrainedModel, job: Job, space: Space, strategy: Strategy) -> dict[str, Tensor]:
        """Weights of the super-network."""
        draw = self._draw(model, space)
        network = SuperNetwork(
            space,
            strategy,
            count=self.subnetworks,
            temperature=self.temperature,
            draw=lambda source: space.decode(draw(source)),
            seed=job.seed,
        )
        return job.trained(model, self._settings(job.seed), [network], network.objective)

    def _settings(self, seed: int) -> Settings:
        return Settings(
            self.epochs,
            self.lr,
            self.batch_size,
            self.max_length,
            warmup=0.0,
            weight_decay=0.01,
            seed=seed,
            dropout=self.dropout,
            bf16=bf16_pays(),
        )

    def _draw(self, model: nn.Module, space: Space) -> Callable[[random.Random], Values]:
        """How a random point of the space is drawn."""
        if self.stratified and space.kind in ("small", "medium"):
            return partial(space.stratified, cost=params(model).of)
        return space.sample

    def _searched(
        self,
        model: PreTrainedModel,
        job: Job,
        space: Space,
        asked: Sampler,
        objectives: Sequence[str],
        costs: dict[str, Cost],
    ) -> list[Point]:
        """Every candidate with its error and its costs, and those of its first layers alone.

        Each evaluation is kept as soon as it is done.
        """
        rows = batches(job.task, "validation", job.tokenizer, max_length=token_limit(job.tokenizer, model))
        limits = {limit.kind: limit.limit for limit in job.constraints}
        points: dict[str, Point] = {}
        judge = Judge(model, job.task, rows)
        with ExitStack() as stack:
            judge_all = stack.enter_context(self._judging(judge, job))
            advance = stack.enter_context(progress("searching", self.evaluations, show=job.show))
            for start in range(0, self.evaluations, self.workers):
                drawn = [asked.ask() for _ in range(min(self.workers, self.evaluations - start))]
                subs = {sub.digest: sub for sub in map(space.decode, drawn)}
                new = dict(enumerate(sub for digest, sub in subs.items() if digest not in points))
                for number, errors in judge_all(new).items():
                    for sub, error in reversed(list(zip(judge.judged(new[number]), errors, strict=True))):
                        if sub.digest not in points:
                            counted = {kind: cost.of(sub) for kind, cost in costs.items()}
                            points[sub.digest] = Point(len(points), sub, error, counted, job.run.seconds["search"])
                for values in drawn:
                    point = points[space.decode(values).digest]
                    asked.tell(values, [point.of(name) for name in objectives], max(0.0, point.beyond(limits)))
                advance(start + len(drawn), f"error {min(p.error for p in points.values()):.3f}")
        return sorted(points.values(), key=lambda point: point.number)

    def _each_trained(
        self,
        model: PreTrainedModel,
        job: Job,
        space: Space,
        asked: Sampler,
        objectives: Sequence[str],
        costs: dict[str, Cost],
    ) -> tuple[list[Point], dict[str, Cost], dict[int, Weights]]:
        """Every candidate trained by itself, the best of them for longer; the weights of those on the front."""
        limits = {limit.kind: limit.limit for limit in job.constraints}
        halving, points, numbers = Halving(self.epochs), dict[int, Point](), dict[str, int]()
        count = 0
        with ExitStack() as stack:
            folder = Path(job.run.folder or stack.enter_context(TemporaryDirectory())) / "alone"
            alone = Alone(model, job, self._settings(job.seed), folder)
            advance = stack.enter_context(progress("training candidates", self.evaluations, show=job.show))
            while (went := halving.promoted()) or count < self.evaluations:
                values = None
                if went is None:
                    values, count = asked.ask(), count + 1
                    sub = space.decode(values)
                    number, rung = numbers.setdefault(sub.digest, len(numbers)), 0
                else:
                    number, rung = went
                    sub = points[number].sub
                if trained := went is not None or number not in points:
                    epochs = halving.rungs[rung]
                    error = job.run.record(
                        f"{sub.digest} {epochs}", partial(alone.error, sub, epochs), part_of="search"
                    )
                    counted = {kind: cost.of(sub) for kind, cost in costs.items()}
                    points[number] = Point(number, sub, error, counted, job.run.seconds["search"])
                found = [points[number].of(name) for name in objectives], max(0.0, points[number].beyond(limits))
                if trained:
                    halving.tell(number, rung, *found)
                if values is not None:
                    asked.tell(values, *found)
                advance(count, f"error {min(p.error for p in points.values()):.3f}")
            kept = [point for point in points.values() if point.beyond(limits) <= 0]
            weights: dict[int, Weights] = {p.number: alone.weights(p.sub) for p in front_of(kept, objectives)}
        return [points[number] for number in sorted(points)], costs, weights

    @contextmanager
    def _judging(
        self, judge: Judge, job: Job
    ) -> Iterator[Callable[[Mapping[int, SubNetwork]], dict[int, list[float]]]]:
        """A function from numbered sub-networks to their errors, which are kept as soon as they are known."""

        def stage(sub: SubNetwork) -> str:
            return f"candidate {sub.digest}"

        def kept(sub: SubNetwork, compute: Callable[[], list[float]], seconds: float | None = None) -> list[float]:
            return list(job.run.record(stage(sub), compute, part_of="search", seconds=seconds))

        def here(subs: Mapping[int, SubNetwork]) -> dict[int, list[float]]:
            return {number: kept(sub, partial(judge.errors, sub)) for number, sub in subs.items()}

        if self.workers == 1:
            yield here
            return
        workers = Workers(judge, self.workers)

        def there(subs: Mapping[int, SubNetwork]) -> dict[int, list[float]]:
            unknown = {number: sub for number, sub in subs.items() if not job.run.has(stage(sub))}
            found = {}
            for number, errors, seconds in workers.errors(unknown):
                found[number] = kept(subs[number], lambda e=errors: e, seconds / self.workers)  # type: ignore[misc]
            found |= here({number: sub for number, sub in subs.items() if number not in unknown})
            return found

        with closing(workers):
            yield there

    def _costs(self, job: Job, objectives: Sequence[str]) -> dict[str, Cost]:
        """What every point is counted by: all that is cheap to count, and the rest if it was asked for."""
        given = {limit.kind: limit.cost for limit in job.constraints}
        kinds = [kind for kind in OBJECTIVES if kind not in DEAR or kind in (*objectives, *given)]
        found = {
            kind: given.get(kind) or cost_of(kind, job.model, job.batch, job.tokens) for kind in kinds if kind != ERROR
        }
        return {kind: self._settled(kind, cost, job) for kind, cost in found.items()}

    def _settled(self, kind: str, cost: Cost, job: Job) -> Cost:
        """A cost of what is cut out, and the same in a resumed run, whose clock would give other milliseconds."""
        if isinstance(cost, LinearCost):
            return bypassed(kind, cost, job.model)
        if not isinstance(cost, LatencyTable):
            return cost
        full = job.run.record("latency of the model", lambda: cost.full.median)
        return cost.scaled(replace(cost.full, median=full))
