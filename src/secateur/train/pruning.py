"""Pruning while training, as a `TrainerCallback` that any `Trainer` takes: one run ends at the wanted sparsity.

MGPP (Zhang, Sun & Liang, arXiv 2411.00969) and what it is compared with share schedule, ranking and masks. They differ
in the score of a weight, and MGPP adds the pull of its prior to the gradient.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerControl, TrainerState, TrainingArguments

from secateur.errors import InvalidData, SecateurError
from secateur.sparsity.groups import groups_of, kinds_of
from secateur.sparsity.prior import MixturePrior
from secateur.sparsity.schedule import annealed_slab, annealed_strength
from secateur.sparsity.selection import pattern_of
from secateur.sparsity.settings import PruningSettings
from secateur.sparsity.weights import prunable, sparsity
from secateur.train.finite import StopsWhenDiverged, check_finite

STATE = "pruning.safetensors"
FEW = 10  # choices: with fewer a warning
PART = 1 << 17  # weights that the prior pulls on at a time


class Pruning(StopsWhenDiverged):
    """Prunes a model while a `Trainer` trains it.

    Gradients are read, and the prior is added to them, after they were clipped and reduced over processes, once for
    each optimiser step. Between two choices a pruned weight may grow again; after the last one the mask holds. A
    resumed run goes on with the same weights and masks.

    Args:
        final: the sparsity to end at, of the weights that can go.
        settings: what decides which go.
        examples: N, the number of training examples, which the prior is divided by; that of the trainer's data if None,
            at each start.
        checkpoint: the folder that training is resumed from, if it is not one of the trainer's own `output_dir`.

    Attributes:
        history: at each choice the step; the sparsity of the masks, of all weights and of the matrices with the least
            and the most; the share of weights, or of weights in groups, below the prior's threshold w*; and w* over the
            learning rate: below 1, the prior cannot hold weights at zero.
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
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Find the weights and the schedule; go on where a checkpoint was written."""
        if model is None:
            raise SecateurError("Pruning needs the model in training: use it with a Trainer.")
        self._check_trainer(args)
        self._reset()
        self.count = self._count(train_dataloader) if self.settings.prior else 0
        self.scaled = bool(args.fp16)
        self.parameters = prunable(model, self.settings.weights, kinds_of(self.pattern))
        if frozen := [name for name, parameter in self.parameters.items() if not parameter.requires_grad]:
            raise SecateurError(f"{frozen[0]} is frozen: train it too, or leave it out (weights, or pattern).")
        self.lr = _peak(optimizer, self.parameters.values(), args.learning_rate)
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

    def _count(self, loader: Any) -> int:
        """N: as given, or the rows of the trainer's data."""
        rows: Any = getattr(loader, "dataset", None)
        if self.examples is None and not hasattr(rows, "__len__"):
            raise InvalidData("The prior is divided by the number of training examples: give Pruning(examples=).")
        count = len(rows) if self.examples is None else self.examples
        if count < 1:
            raise InvalidData("Pruning while training needs training rows: there are none.")
        return count

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
        if strength == 0:
            return
        squares = self.groups.squares({name: parameter.detach() for name, parameter in self.parameters.items()})
        for name, parameter in self.parameters.items():
            if parameter.grad is None:
                continue
            prior, size, weight = self.prior_at(step, name), squares(name), parameter.detach()
            if size is not None:
                parameter.grad.addcmul_(weight, prior.precision(size), value=strength / self.count)
                continue
            for part, grad in zip(*_in_parts(weight, parameter.grad), strict=True):
                # half precision is computed in float32, where w² does not vanish
                grad.addcmul_(part, prior.precision(part.float().square()), value=strength / self.count)

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
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **_: Any,
    ) -> None:
        """Choose weights, if it is time, and set them to zero."""
        step = state.global_step
        if self.schedule.chooses(step) and self._scored(step):
            if model is not None:
                check_finite(model, step + 1)
            scores = {name: self._score(name) for name in self.parameters}
            self._masks = self.groups.choose(scores, self.schedule.sparsity(step), self.settings.floor)
            if self.settings.score != "movement" or step == self.schedule.end:
                self._apply()
            self.history.append(self._look(step, optimizer))
        elif step > self.schedule.end:
            self._apply()

    def _scored(self, step: int) -> bool:
        """Whether there are scores: steps that overflow in fp16 give none, and the next choice is waited for.

        Raises:
            SecateurError: there are none for the last choice.
        """
        kinds = {"magnitude": (), "platon": ("mean", "doubt"), "movement": ("score",)}[self.settings.score]
        found = all(f"{name}|{kind}" in self._state for name in self.parameters for kind in kinds)
        if not found and step == self.schedule.end:
            raise SecateurError("No step had finite gradients, so that no weight has a score: lower the learning rate.")
        return found

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
        each = [sparsity({name: mask}) for name, mask in self._masks.items()]
        found = {"step": step, "sparsity": sparsity(self._masks), "sparsity_least": min(each)}
        found["sparsity_most"] = max(each)
        if self.settings.prior:
            priors = {name: self.prior_at(step, name) for name in self.parameters}
            weights = {name: parameter.detach() for name, parameter in self.parameters.items()}
            squares, inside = self.groups.squares(weights), 0
            for name, weight in weights.items():
                size = squares(name)
                below = (weight.float().square() if size is None else size) < priors[name].threshold ** 2
                inside += int(below.expand(weight.shape).sum())
            found["in_spike"] = inside / sum(weight.numel() for weight in weights.values())
            rate = max((group["lr"] for group in getattr(optimizer, "param_groups", ())), default=0)
            if rate > 0:  # of a group: w* of the root of its mean square
                found["spike_over_lr"] = max(p.threshold / p.group**0.5 for p in priors.values()) / rate
        return {key: round(value, 6) for key, value in found.items()}

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """What the last choice found, in the trainer's history; `CompressionTrainer` shows it to its writers too."""
        for kept in (logs, state.log_history[-1] if state.log_history else None):
            if kept is not None:
                kept |= self.last

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Keep scores, masks and history beside a checkpoint."""
        if state.is_world_process_zero:
            masks = {f"{name}|mask": mask for name, mask in self._masks.items()}
            kept = {name: tensor.contiguous() for name, tensor in (self._state | masks).items()}
            file = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / STATE
            save_file(kept, file, {"history": json.dumps(self.history)})

    def _resume(self, file: Path) -> None:
        if not file.is_file():
            raise SecateurError(
                f"{file.parent} holds no pruning to go on with: name the folder, Pruning(checkpoint=), or start anew."
            )
        with safe_open(file, "pt") as kept:
            self.history = json.loads((kept.metadata() or {}).get("history", "[]"))
            found = {key: kept.get_tensor(key) for key in kept.keys()}  # noqa: SIM118 - no mapping
        for key, tensor in found.items():
            name, _, kind = key.rpartition("|")
            tensor = tensor.to(self.parameters[name].device)
            if kind == "mask":
                self._masks[name] = tensor
            else:
                self._state[key] = tensor

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **more: Any,
    ) -> None:
        """Set the chosen weights to zero once more, and check."""
        self._apply()
        super().on_train_end(args, state, control, model, **more)
        reached, total = sparsity(self.parameters), sum(weight.numel() for weight in self.parameters.values())
        if reached >= self.final - 3 * self.groups.largest / total:
            return
        ended = f"Training ended at a sparsity of {reached:.6f} instead of {self.final:g}"
        if state.global_step == state.max_steps:
            raise SecateurError(f"{ended}.")
        warnings.warn(
            f"{ended}: it stopped after {state.global_step} of {state.max_steps} steps, and weights are chosen up to "
            f"step {self.schedule.end}. Resume it, or plan fewer steps.",
            stacklevel=2,
        )

    def sparsities(self) -> dict[str, float]:
        """Share of zeros of each matrix."""
        return {name: sparsity({name: parameter}) for name, parameter in self.parameters.items()}


def _in_parts(*tensors: Tensor) -> list[Sequence[Tensor]]:
    """Tensors in parts that stay in a core's cache from one pass over them to the next; whole, if one has gaps."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return [(tensor,) for tensor in tensors]
    return [tensor.view(-1).split(PART) for tensor in tensors]


def _peak(optimizer: Any, parameters: Iterable[nn.Parameter], usual: float) -> float:
    """The peak learning rate of the optimiser that moves some parameters: before any schedule scaled it."""
    mine = {id(parameter) for parameter in parameters}
    groups = [g for g in getattr(optimizer, "param_groups", ()) if any(id(p) in mine for p in g["params"])]
    return max((float(group.get("initial_lr", group["lr"])) for group in groups), default=usual)
