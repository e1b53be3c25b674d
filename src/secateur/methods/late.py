"""LATE: token elimination with a latency dial (Kachuee & Sharifkhani, arXiv 2201.03327)."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur import hub
from secateur.bits.modules import is_binary
from secateur.checks import check_fields, check_shares
from secateur.costs.analytic import macs
from secateur.costs.budget import Term
from secateur.costs.dial import alpha_for_latency
from secateur.edits import DropTokens
from secateur.edits.tokens import Dial, dial_of
from secateur.errors import InvalidBudget, SecateurError
from secateur.families import sites
from secateur.optimize.tokens import SHARES, Changes, relative_change
from secateur.progress import progress
from secateur.run import Job, Outcome
from secateur.subnetwork import SubNetwork
from secateur.tokens.handover import is_causal
from secateur.tokens.scores import Acc, Weighting, context_size, profile
from secateur.tokens.state import Pass
from secateur.train import Settings, bf16_pays


@dataclass
class Late:
    """Hyper-parameters of LATE: ACC is measured, then the model learns to work with fewer tokens per layer.

    Attributes:
        train_speedup: K at the end of the ramp; the budget's, if that asks for more.
        epochs, lr, batch_size: of the training with elimination.
        ramp: share of the steps over which the dial rises from 0 to its setting for `train_speedup`.
        sandwich: after the ramp, half the steps draw the setting between dense and `train_speedup` and a quarter takes
            each end, so that the whole range of the dial is learned; else every step takes `train_speedup`.
        distill: weight of the distance to the dense model's outputs in the loss, from 0 to 1.
        acc: what is measured: the "effect" on the output (`search.tokens.Changes`), or the "mass",
            "participation", "entropy" or "count" of the scores (`tokens.scores.context_size`).
        tolerance: of "effect": the accepted change of the output, as a share of its variance; None takes two,
            at which the profiles are as fast as the root of `train_speedup` and as `train_speedup` itself.
        rho: ρ of "mass".
        tau: τ of "count".
        weighting: tokens are scored by the "attention" they get, or by its product with the size of their "value".
        diagonal: count what a token pays to itself.
        beta: weight of the layers before in the score, from 0 to below 1.
        queries: so many queries score the tokens of a text that is over four times as long.
        least: floor of the share of tokens that a layer hands on.
        protected: tokens at the beginning that always stay.
        recent: tokens at the end that always stay; a decoder keeps its last one in any case.
        examples: training rows that ACC is measured on.
        max_length: tokens beyond this are cut off in training.
        dropout: share of activations set to zero in training; none keeps the model's.
    """

    train_speedup: float = 3.0
    epochs: int = 3
    lr: float = 1e-4
    batch_size: int = 32
    ramp: float = 0.3
    sandwich: bool = True
    distill: float = 1.0
    acc: Acc | Literal["effect"] = "effect"
    tolerance: float | None = None
    rho: float = 0.95
    tau: float = 0.5
    weighting: Weighting = "value"
    diagonal: bool = False
    beta: float = 0.0
    queries: int = 64
    least: float = 0.02
    protected: int = 1
    recent: int | None = None
    examples: int = 256
    max_length: int = 128
    dropout: float | None = None

    name: ClassVar[str] = "late"
    budgets: ClassVar[frozenset[str]] = frozenset({"speedup", "macs", "latency"})
    usual_budget: ClassVar[str] = "speedup>=2"
    cuts_units: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        if self.train_speedup <= 1:
            raise SecateurError(f"late: train_speedup is above 1, not {self.train_speedup:g}.")
        check_shares(self, "ramp", "distill", "rho", "least")
        check_shares(self, "beta", "dropout", below=True)
        if self.least == 0:
            raise SecateurError("late: least is above 0: some tokens go on.")

    def run(self, job: Job) -> Outcome:
        """Measure ACC, train with elimination, set the dial to the budget."""
        sample = partial(job.calibration, -(-self.examples // self.batch_size), self.batch_size)
        acc = job.run.record("acc", lambda: self.measure(job.model, sample(), job.tokens, show=job.show))
        model = copy.deepcopy(job.model)
        edit = self._edit(model, acc, job.tokens)
        edit.apply(model)
        dial = dial_of(model)
        asked = job.run.record("setting", lambda: setting_for(job, model))  # refused, if so, before the long part
        if self.train_speedup > dial.reach:
            raise SecateurError(
                f"late: train_speedup={self.train_speedup:g} is beyond this model's reach at {job.tokens} tokens, "
                f"{dial.reach:.3g}: ask for less."
            )
        goal = max(dial.alpha_for(self.train_speedup), asked)
        trained = job.run.tensors("train", lambda: self._train(model, job, goal))
        model.load_state_dict(trained)
        dial.alpha = asked
        nn.Module.to(model, job.model.device)  # training may have left it elsewhere
        hub.attach(model.eval(), [edit])
        return Outcome(model, [dial.edit], SubNetwork.full(model), predicted=job.costs(model))

    def edit(self, model: PreTrainedModel, inputs: Sequence[dict[str, Tensor]], tokens: int = 128) -> DropTokens:
        """Elimination without training: ACC is measured, and the edit it gives can be applied to the model.

        Args:
            model: an encoder, or a decoder whose prompts are to be shortened; it is left unchanged.
            inputs: batches of `input_ids` and `attention_mask`, as the model will see them.
            tokens: length at which a speed-up counts.
        """
        return self._edit(model, self.measure(model, inputs, tokens), tokens)

    def _edit(self, model: PreTrainedModel, acc: Sequence[Sequence[float]], tokens: int) -> DropTokens:
        recent = self.recent or int(is_causal(model))
        m, *more = map(profile, acc)
        return DropTokens(
            m,
            tokens,
            weighting=self.weighting,
            diagonal=self.diagonal,
            beta=self.beta,
            queries=self.queries,
            least=self.least,
            protected=self.protected,
            recent=recent,
            steeper=next(iter(more), ()),
        )

    def measure(
        self, model: PreTrainedModel, inputs: Sequence[dict[str, Tensor]], tokens: int = 128, *, show: bool = False
    ) -> list[list[float]]:
        """ACC of each layer of a dense model, which is left unchanged; 1 where a layer has no attention to score.

        By its effect, and without a `tolerance`, ACC is measured at two tolerances: those at which the model is √K and
        K times as fast, K being `train_speedup`.

        Args:
            model: the model.
            inputs: batches of `input_ids` and `attention_mask`.
            tokens: length at which a speed-up counts.
            show: show progress on standard error.
        """
        twin = copy.deepcopy(model).eval()
        self._edit(twin, [(1.0,) * len(sites(twin).neurons)], 1).apply(twin)
        data = [{name: tensor.to(twin.device) for name, tensor in batch.items()} for batch in inputs]
        with torch.inference_mode():
            return (
                self._effect(twin, data, tokens, show)
                if self.acc == "effect"
                else [self._context(twin, data, self.acc)]
            )

    def _effect(
        self, model: PreTrainedModel, inputs: list[dict[str, Tensor]], tokens: int, show: bool
    ) -> list[list[float]]:
        """What each layer must hand on for the output to stay as it is."""
        dial = dial_of(model)
        dense = outputs(model, inputs)
        layers = len(dial.profile)
        steps = count(1)
        with progress("measuring ACC", layers * (len(SHARES) + 1), show=show) as advance:

            def change(shares: tuple[float, ...]) -> float:
                advance(next(steps), "")
                with dial.handing_on(shares):
                    return relative_change(outputs(model, inputs), dense)

            changes = Changes.measure(change, layers, self.least)
        if self.tolerance is not None:
            return [list(changes.sufficient(self.tolerance))]

        def speedup(shares: tuple[float, ...]) -> float:
            return dial.costs.at(shares, 1.0, tokens, self.least, self.protected + dial.selection.recent)

        wanted = (math.sqrt(self.train_speedup), self.train_speedup)
        return [list(changes.sufficient_for(speedup, k)) for k in wanted]

    def _context(self, model: PreTrainedModel, inputs: list[dict[str, Tensor]], acc: Acc) -> list[float]:
        """How much of the sequence each layer's attention uses: the mean over the examples."""
        dial = dial_of(model)
        passes: list[Pass] = []
        found: dict[int, list[Tensor]] = {}
        with dial.watch(passes.append):
            for batch in inputs:
                model(**batch)
                for layer, score in passes.pop().seen.items():
                    size = context_size(score, acc, rho=self.rho, tau=self.tau)
                    found.setdefault(layer, []).append(size.cpu())
        return [float(torch.cat(found[i]).mean()) if i in found else 1.0 for i in range(len(dial.profile))]

    def _train(self, model: PreTrainedModel, job: Job, goal: float) -> dict[str, Tensor]:
        """Weights after training with elimination, up to the setting `goal`."""
        binary = is_binary(model)
        settings = Settings(
            self.epochs,
            self.lr,
            self.batch_size,
            self.max_length,
            warmup=0.1,
            weight_decay=0.01,
            seed=job.seed,
            dropout=self.dropout,
            bf16=bf16_pays() and not binary,  # rounded sums would reach other levels
            bf16_products=bf16_pays() and binary,
        )
        turning = Turning(dial_of(model), goal, self.ramp, self.sandwich, job.seed)
        return job.trained(model, settings, [turning], job.distillation(self.distill))


def outputs(model: PreTrainedModel, inputs: list[dict[str, Tensor]]) -> Tensor:
    """A model's outputs, (rows, outputs): a row for each example or, of a head on tokens, for each real token.

    Of a decoder that writes text a row is what follows the last token.
    """
    rows = []
    for batch in inputs:
        found = model(**batch)
        real = batch["attention_mask"].bool()
        logits = getattr(found, "logits", None)
        if logits is None:  # where an answer starts and where it ends
            logits = torch.cat([found.start_logits[real], found.end_logits[real]])[:, None]
        if logits.dim() == 3:
            if is_causal(model):
                real = real & (real.flip(-1).cumsum(-1).flip(-1) == 1)
            logits = logits[real]
        rows.append(logits.float())
    return torch.cat(rows)


class Turning(TrainerCallback):
    """Turns the dial during training, in the same way after a resume: a ramp, then a goal or a range.

    Args:
        dial: of the model in training.
        goal: the setting to reach.
        ramp: share of the steps until then.
        sandwich: after the ramp, draw settings from the whole range.
        seed: of the draws.
    """

    def __init__(self, dial: Dial, goal: float, ramp: float, sandwich: bool, seed: int) -> None:
        self.dial = dial
        self.goal = goal
        self.ramp = ramp
        self.sandwich = sandwich
        self.seed = seed

    def alpha(self, step: int, steps: int) -> float:
        """The setting at a step, counted from 0."""
        top = self.goal * min(1.0, step / max(1.0, self.ramp * steps))
        if not self.sandwich or step < self.ramp * steps:
            return top
        draw = random.Random(f"{self.seed}/{step}")
        kind = draw.random()
        if kind < 0.5:
            return draw.uniform(0, self.goal)
        return 0.0 if kind < 0.75 else self.goal

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Turn the dial."""
        self.dial.alpha = self.alpha(state.global_step, state.max_steps)


def setting_for(job: Job, model: PreTrainedModel) -> float:
    """The smallest setting of the dial that meets every constraint.

    Raises:
        InvalidBudget: a constraint is beyond reach.
    """
    dial = dial_of(model)
    found = 0.0
    with dial.at(0.0):
        dense = macs(model, job.batch, job.tokens).of(SubNetwork.full(model)) / job.batch
    layers = dial.costs.macs(job.tokens, [job.tokens] * len(dial.profile))
    for constraint in job.constraints:
        if constraint.kind == "latency":
            found = max(found, alpha_for_latency(model, dial, constraint.limit, job.batch, job.tokens))
            continue
        left = constraint.limit / job.batch - (dense - layers)
        if left <= 0 or layers / left > dial.reach:
            nearest = (dense - layers + layers / dial.reach) * job.batch
            term = constraint.term or Term(constraint.kind, constraint.limit, "")
            raise InvalidBudget(
                f"{term} is beyond reach by eliminating tokens. At {job.tokens} tokens the nearest feasible budget is "
                f"{term.at_least(nearest, dense * job.batch)}."
            )
        found = max(found, dial.alpha_for(max(1.0, layers / left)))
    return found
