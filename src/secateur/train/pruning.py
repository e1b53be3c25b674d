"""Pruning while training, as a `TrainerCallback` that any `Trainer` takes: one run ends at the wanted sparsity.

MGPP (Zhang, Sun & Liang, arXiv 2411.00969) and what it is compared with share schedule, ranking and masks. They differ
in the score of a weight, and MGPP adds the pull of its prior to the gradient.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.checks import check_fields, check_shares
from secateur.errors import InvalidData, SecateurError
from secateur.sparsity.groups import groups_of, kinds_of
from secateur.sparsity.prior import MixturePrior, spike_for
from secateur.sparsity.schedule import CubicSchedule, annealed_slab, annealed_strength
from secateur.sparsity.selection import pattern_of
from secateur.sparsity.weights import prunable, sparsity

Score = Literal["magnitude", "platon", "movement"]
STATE = "pruning.safetensors"
FEW = 10  # choices: with fewer a warning
RATES = 1.5  # w* over the peak learning rate; 1 to 3 in the authors' settings


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
        spike: v0, variance of the spike; None takes the one whose w* is 1.5 times the peak learning rate, so that the
            prior holds weights at zero whatever the rate.
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


class Pruning(TrainerCallback):
    """Prunes a model while a `Trainer` trains it.

    Gradients are read, and the prior is added to them, after they were clipped and reduced over processes, once for
    each optimiser step. Between two choices a pruned weight may grow again; after the last one the mask holds. A
    resumed run goes on with the same weights and masks.

    Args:
        final: the sparsity to end at, of the weights that can go.
        settings: what decides which go.
        examples: N, the number of training examples, which the prior is divided by; that of the trainer's data if None.
        checkpoint: the folder that training is resumed from, if it is not one of the trainer's own `output_dir`.

    Attributes:
        history: at each choice the step, the sparsity reached, the share of weights below the prior's threshold w*, and
            w* over the learning rate: below 1, the prior cannot hold weights at zero.
    """

    def __init__(
        self,
        final: float,
        settings: PruningSettings | None = None,
        examples: int | None = None,
        checkpoint: str | Path | None = None,
    ) -> None:
        self.final = final
        self.checkpoint = checkpoint
        self.settings = settings or PruningSettings()
        self.pattern = pattern_of(self.settings.pattern)
        if not 0 < final < 1:
            share = f" ({final:g} % is {final / 100:g})" if 1 < final < 100 else ""
            raise SecateurError(f"A sparsity lies between 0 and 1, not at {final:g}{share}.")
        if final > self.pattern.most:
            raise SecateurError(
                f"The pattern {self.pattern.text} reaches a sparsity of {self.pattern.most:g}, not {final:g}."
            )
        if self.pattern.most == 1 and final > 1 - self.settings.floor:
            raise SecateurError(
                f"A sparsity of {final:g} is out of reach while each matrix keeps {self.settings.floor:g}: lower floor."
            )
        self.examples = examples
        self._reset()

    def _reset(self) -> None:
        self.history: list[dict[str, float]] = []
        self._masks: dict[str, Tensor] = {}
        self._state: dict[str, Tensor] = {}
        self._dense: dict[str, Tensor] = {}

    @property
    def last(self) -> dict[str, float]:
        """What was found at the last choice, without its step."""
        return {key: value for key, value in self.history[-1].items() if key != "step"} if self.history else {}

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        train_dataloader: Any = None,
        **_: Any,
    ) -> None:
        """Find the weights and the schedule; go on where a checkpoint was written."""
        if model is None:
            raise SecateurError("Pruning needs the model in training: use it with a Trainer.")
        self._check_trainer(args)
        self._reset()
        if self.examples is None and self.settings.prior:
            rows: Any = getattr(train_dataloader, "dataset", None)
            if not hasattr(rows, "__len__"):
                raise InvalidData("The prior is divided by the number of training examples: give Pruning(examples=).")
            self.examples = len(rows)
        if self.examples is not None and self.examples < 1:
            raise InvalidData("Pruning while training needs training rows: there are none.")
        self.scaled, self.lr = bool(args.fp16), args.learning_rate
        self.parameters = prunable(model, self.settings.weights, kinds_of(self.pattern))
        self.groups = groups_of(model, self.parameters, self.pattern)
        self.schedule = self.settings.schedule(self.final, state.max_steps)
        if self.schedule.choices < FEW:
            warnings.warn(
                f"Weights are chosen only {self.schedule.choices} times on the way to a sparsity of {self.final:g}, "
                "which may ruin the model: train for more epochs, or lower interval.",
                stacklevel=2,
            )
        self.begun = int(self.settings.before * state.max_steps)
        if state.global_step > 0:
            self._resume(Path(self.checkpoint or f"{args.output_dir}/checkpoint-{state.global_step}") / STATE)

    def _check_trainer(self, args: TrainingArguments) -> None:
        """Refuse what would give another result than asked for."""
        if args.fp16 and not args.max_grad_norm:
            raise SecateurError("Pruning in fp16 needs gradients that were scaled back: set max_grad_norm above 0.")
        if args.load_best_model_at_end:
            raise SecateurError("The best model may be an early one, which is denser: unset load_best_model_at_end.")
        if args.deepspeed or args.fsdp:
            raise SecateurError("Pruning reads whole weights and gradients: train without DeepSpeed and FSDP.")

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Movement: the pass runs on masked weights, and the others are kept aside."""
        if self.settings.score == "movement" and self._masks:
            for name, parameter in self.parameters.items():
                self._dense[name] = parameter.detach().clone()
            self._apply()

    @torch.no_grad()
    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Read gradients, and add the prior's."""
        for name, kept in self._dense.items():
            self.parameters[name].copy_(kept)
        self._dense.clear()
        step = state.global_step
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            follows = self.settings.score in ("platon", "movement") and step <= self.schedule.end
            if follows and not (self.scaled and not bool(parameter.grad.isfinite().all())):  # such a step is skipped
                self._follow(name, parameter, parameter.grad, step)
            if self.settings.score == "movement" and name in self._masks:
                parameter.grad.mul_(self._masks[name])
        if self.settings.prior and step <= self.schedule.end:
            self._pull(step)

    def _pull(self, step: int) -> None:
        """Add the prior's gradient over N."""
        strength = annealed_strength(0, self.begun, step) if self.settings.anneal == "strength" else 1.0
        if strength == 0 or self.examples is None:
            return
        squares = self.groups.squares({name: parameter.detach() for name, parameter in self.parameters.items()})
        for name, parameter in self.parameters.items():
            if parameter.grad is not None:
                size = squares(name)  # half precision is computed in float32, where w² does not vanish
                precision = self.prior_at(step, name).precision(parameter.float().square() if size is None else size)
                parameter.grad.addcmul_(parameter, precision, value=strength / self.examples)

    def prior_at(self, step: int, name: str) -> MixturePrior:
        """The prior of a matrix's weights at a step."""
        chosen, group = self.settings, self.groups.size(name)
        if chosen.anneal != "slab":
            return chosen.mixture(self.lr, group=group)
        return chosen.mixture(self.lr, annealed_slab(chosen.slab_share, chosen.slab_last, self.schedule, step), group)

    def _follow(self, name: str, weight: Tensor, grad: Tensor, step: int) -> None:
        """Scores that gather over steps: of "platon" over windows of the interval, whose means are then averaged."""
        product = weight.float() * grad.float()
        if self.settings.score == "movement":
            self._state[f"{name}|score"] = self._state.get(f"{name}|score", 0) - product
            return
        window, steps, mean, doubt = (f"{name}|{kind}" for kind in ("window", "steps", "mean", "doubt"))
        self._state[window] = self._state.get(window, 0) + product.abs()
        self._state[steps] = self._state.get(steps, torch.zeros(1)) + 1
        if step % self.settings.interval and not self.schedule.chooses(step):
            return
        now = self._state.pop(window) / float(self._state.pop(steps))
        nothing = torch.zeros_like(now)
        self._state[mean] = self._state.get(mean, nothing).lerp(now, 1 - self.settings.memory)
        spread = (now - self._state[mean]).abs()
        self._state[doubt] = self._state.get(doubt, nothing).lerp(spread, 1 - self.settings.doubt)

    @torch.no_grad()
    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, optimizer: Any = None, **_: Any
    ) -> None:
        """Choose weights, if it is time, and set them to zero."""
        step = state.global_step
        if self.schedule.chooses(step):
            scores = {name: self._score(name) for name in self.parameters}
            self._masks = self.groups.choose(scores, self.schedule.sparsity(step), self.settings.floor)
            if self.settings.score != "movement" or step == self.schedule.end:
                self._apply()
            self.history.append(self._look(step, optimizer))
        elif step > self.schedule.end:
            self._apply()

    def _score(self, name: str) -> Tensor:
        if self.settings.score == "movement":
            return self._state[f"{name}|score"]
        if self.settings.score == "platon":
            return self._state[f"{name}|mean"] * self._state[f"{name}|doubt"]
        return self.parameters[name].detach().abs()

    @torch.no_grad()
    def _apply(self) -> None:
        for name, mask in self._masks.items():
            self.parameters[name].masked_fill_(~mask, 0)

    def _look(self, step: int, optimizer: Any) -> dict[str, float]:
        found = {"step": step, "sparsity": round(sparsity(self._masks), 6)}
        if self.settings.prior:
            limits = {name: self._limit(step, name) for name in self.parameters}
            total = sum(p.numel() for p in self.parameters.values())
            inside = sum(int((p.detach().abs() < limits[name]).sum()) for name, p in self.parameters.items())
            found["in_spike"] = round(inside / total, 6)
            rates = [group["lr"] for group in getattr(optimizer, "param_groups", ())]
            if rates and max(rates) > 0:
                found["spike_over_lr"] = round(max(limits.values()) / max(rates), 3)
        return found

    def _limit(self, step: int, name: str) -> float:
        """w* of a single weight; of a group, that of the root of its mean square."""
        prior = self.prior_at(step, name)
        return prior.threshold / prior.group**0.5

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """What the last choice found, in the trainer's history; `CompressionTrainer` shows it to its writers too."""
        for kept in (logs, state.log_history[-1] if state.log_history else None):
            if kept is not None:
                kept |= self.last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep scores and masks beside a checkpoint."""
        if state.is_world_process_zero:
            masks = {f"{name}|mask": mask for name, mask in self._masks.items()}
            kept = {name: tensor.contiguous() for name, tensor in (self._state | masks).items()}
            save_file(kept, Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE)

    def _resume(self, file: Path) -> None:
        if not file.is_file():
            raise SecateurError(
                f"{file.parent} holds no pruning to go on with: name the folder, Pruning(checkpoint=), or start anew."
            )
        for key, tensor in load_file(file).items():
            name, _, kind = key.rpartition("|")
            tensor = tensor.to(self.parameters[name].device)
            if kind == "mask":
                self._masks[name] = tensor
            else:
                self._state[key] = tensor

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Set the chosen weights to zero once more, and check."""
        self._apply()
        reached, total = sparsity(self.parameters), sum(weight.numel() for weight in self.parameters.values())
        if state.global_step == state.max_steps and reached < self.final - 3 * self.groups.largest / total:
            raise SecateurError(f"Training ended at a sparsity of {reached:.6f} instead of {self.final:g}.")

    def sparsities(self) -> dict[str, float]:
        """Share of zeros of each matrix."""
        return {name: sparsity({name: parameter}) for name, parameter in self.parameters.items()}
