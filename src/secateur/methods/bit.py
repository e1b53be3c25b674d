"""BiT: 1-bit weights and activations, distilled step by step (Liu et al., NeurIPS 2022, arXiv 2205.13016)."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from secateur import hub
from secateur.binary import binarize, bits_of
from secateur.bits.modules import quantizers
from secateur.bits.quantizers import BITS, Estimate
from secateur.checks import check_fields, check_shares
from secateur.costs.budget import Constraint
from secateur.edits.binarize import Embeddings
from secateur.errors import InvalidBudget, SecateurError
from secateur.run import Job, Outcome
from secateur.subnetwork import SubNetwork
from secateur.tasks import evaluate, with_replaced_words
from secateur.train import KeepBest, Settings, bf16_pays, imitated


@dataclass
class Bit:
    """Hyper-parameters of BiT.

    Attributes:
        through: activation bits of the steps before the last one, such as 2 or "4,2"; none for a single step. Each
            step begins with the weights of the one before, which teaches it. The last step's bits are the budget's.
        mixed: fewer activation bits for some sites in the last step, by expressions of which the last that fits counts:
            ".=1, :probs=4" under the budget "bits<=4".
        embeddings: how the table of words is stored: "1bit", with which the model computes, "int8" or "float".
        rows: a scale of the weights for each output instead of one for the map.
        two_sets: levels from 0 for what a ReLU gives, as for probabilities; else signed ones.
        relu: a ReLU in place of the model's activation in the feed-forward blocks.
        calibration: how the scales of activations begin: "mean", "analytic" or "search".
        elastic: learn the scales and shifts of activations.
        distill: learn from the teacher's outputs and hidden states; else from the labels.
        augment: so many copies of each training row, with words replaced by similar ones, for the teacher to answer.
        epochs: of each step.
        lr: peak learning rate of the weights.
        batch_size: examples per step of the optimiser.
        scale_lr: peak learning rate of the scales.
        weight_decay: of the weights; shifts, scales, biases and norms have none.
        warmup: share of the steps over which the rates rise.
        eps: of AdamW.
        dropout: share of activations set to zero in training; none keeps the model's.
        max_length: tokens beyond this are cut off in training.
        batches: of 32 examples to calibrate on.
    """

    through: int | str | None = 2
    mixed: str | None = None
    embeddings: Embeddings = "1bit"
    rows: bool = False
    two_sets: bool = True
    relu: bool = True
    calibration: Estimate = "search"
    elastic: bool = True
    distill: bool = True
    augment: int | None = None
    epochs: int = 10
    lr: float = 2e-4
    batch_size: int = 16
    scale_lr: float = 1e-4
    weight_decay: float = 0.01
    warmup: float = 0.1
    eps: float = 1e-6
    dropout: float | None = None
    max_length: int = 128
    batches: int = 4

    name: ClassVar[str] = "bit"
    budgets: ClassVar[frozenset[str]] = frozenset({"bits"})
    usual_budget: ClassVar[str] = "bits<=1"
    cuts_units: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)
        check_shares(self, "warmup")
        check_shares(self, "dropout", below=True)
        self._before(), self._mixed()
        if self.augment is not None and not self.distill:
            raise SecateurError("bit: with other words a row's label may be wrong: augment needs distill.")

    def run(self, job: Job) -> Outcome:
        """Binarize and train, step by step."""
        steps = self._steps(job.model, job.constraints)
        if frozen := [name for name, parameter in job.model.named_parameters() if not parameter.requires_grad]:
            raise SecateurError(f"bit: {frozen[0]} is frozen, and binarizing trains every weight: let it train.")
        batches = job.calibration(self.batches, 32, max_length=self.max_length)
        model, teacher = copy.deepcopy(job.model), copy.deepcopy(job.model)
        if self.augment is not None:
            words = cast(Tensor, model.get_input_embeddings().weight)
            job = replace(job, task=with_replaced_words(job.task, job.tokenizer, words, self.augment, seed=job.seed))
        for number, count in enumerate(steps, 1):
            binarize(
                model,
                batches,
                count,
                mixed=self._mixed() if number == len(steps) else None,
                embeddings=self._embeddings(model),
                rows=self.rows,
                two_sets=self.two_sets,
                relu=self.relu,
                calibration=self.calibration,
            )
            stage, guide = f"step {number} of {len(steps)}, {count} bits", teacher
            trained = job.run.tensors(stage, lambda s=stage, t=guide: self._train(model, t, job, s))  # type: ignore[misc]
            model.load_state_dict(trained)
            nn.Module.to(model, job.model.device)
            teacher = copy.deepcopy(model)
        model.eval().requires_grad_(True)
        bits = float(max(quantizer.levels.bits for quantizer in quantizers(model)))
        counted = job.costs(model) | {"bits": bits}
        return Outcome(model, hub.edits_of(model), SubNetwork.full(model), predicted=counted)

    def check(self, model: PreTrainedModel, limits: Sequence[Constraint], rows: int) -> dict[str, int]:
        """Raise what a run would, before it is begun; the steps of its training.

        Args:
            model: the model to be binarized.
            limits: the budget.
            rows: training examples.

        Raises:
            SecateurError: bits out of reach, or a site that the model does not have.
        """
        rows *= 1 + (self.augment or 0)
        return {"steps": len(self._steps(model, limits)) * self.epochs * -(-rows // self.batch_size)}

    def _steps(self, model: PreTrainedModel, limits: Sequence[Constraint]) -> list[int]:
        """Activation bits of each step."""
        limit = next(c.limit for c in limits if c.kind == "bits")
        last = max((count for count in BITS if count <= limit), default=0)
        if not last:
            raise InvalidBudget(f"bits<={limit:g} is out of reach: an activation has at least 1 bit.")
        sites = bits_of(model, last, self._mixed())  # what does not fit is found before anything is trained
        if high := [f"{name}={count}" for name, count in self._mixed().items() if count > limit]:
            raise InvalidBudget(f"bit: mixed has {high[0]}, above the budget bits<={limit:g}: raise the budget.")
        return [*(count for count in self._before() if count > min(sites.values())), last]

    def _before(self) -> list[int]:
        """Bits of the steps before the last."""
        try:
            found = [int(part) for part in str(self.through).split(",")] if self.through is not None else []
        except ValueError:
            raise SecateurError(f"bit: through is such as 2 or '4,2', or none, not {self.through!r}.") from None
        if not all(count in BITS for count in found) or sorted(set(found), reverse=True) != found:
            raise SecateurError(f"bit: through has falling bits out of 8, 4, 2, 1, not {self.through!r}.")
        return found

    def _mixed(self) -> dict[str, int]:
        """Bits by expression."""
        pairs = [pair.rpartition("=") for pair in (self.mixed or "").split(",") if pair.strip()]
        if not all(name.strip() and count.strip().isdecimal() for name, _, count in pairs):
            raise SecateurError(f"bit: mixed is such as '.=1, :probs=4', not {self.mixed!r}.")
        found: dict[str, int] = {}
        for name, _, count in pairs:
            found.pop(name.strip(), None)  # of an expression that comes again the last place counts
            found[name.strip()] = int(count)
        return found

    def _embeddings(self, model: PreTrainedModel) -> Embeddings:
        """The table of words as asked for; of a model that reads none, as it is."""
        return self.embeddings if isinstance(model.get_input_embeddings(), nn.Embedding) else "float"

    def _train(self, model: PreTrainedModel, teacher: PreTrainedModel, job: Job, stage: str) -> dict[str, Tensor]:
        """Weights of the epoch that is best on validation, or of the last one without such rows."""
        for quantizer in quantizers(model):
            quantizer.requires_grad_(self.elastic)
        settings = Settings(
            self.epochs,
            self.lr,
            self.batch_size,
            self.max_length,
            warmup=self.warmup,
            weight_decay=self.weight_decay,
            seed=job.seed,
            dropout=self.dropout,
            bf16=False,
            eps=self.eps,
            scale_lr=self.scale_lr,
            bf16_products=bf16_pays(),
        )
        with tempfile.TemporaryDirectory() as spare:
            folder = Path(spare) if job.run.folder is None else job.run.folder / stage
            best = KeepBest(lambda net: self._score(net, job), folder)
            objective = imitated(teacher) if self.distill else None
            job.trained(model, settings, [best] if job.task.validation is not None else [], objective, stage)
            best.restore(model)
        return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}

    def _score(self, model: PreTrainedModel, job: Job) -> float:
        return evaluate(model, job.tokenizer, job.task, "validation").metrics[job.task.metric]
