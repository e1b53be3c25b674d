"""What training a binary model needs besides the loop: latent weights in checkpoints, and the best of its epochs."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed, nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.edits import Binarize
from secateur.hub import edits_of

LATENT = "latent.safetensors"
BEST = "best.safetensors"


class LatentWeights(TrainerCallback):
    """Keeps the float weights behind the bits beside a checkpoint, which itself holds bits, and goes on from them.

    Attributes:
        checkpoint: the folder that training goes on from, if it is not one of the trainer's own `output_dir`.
    """

    checkpoint: Path | None = None

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Write them."""
        if model is not None and state.is_world_process_zero and (latent := _latent(model)):
            save_file(latent, _folder(args, state) / LATENT)

    @torch.no_grad()
    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Read them, if training goes on; without them it goes on from ±s, with a warning."""
        if model is None or state.global_step == 0 or not (latent := _latent(model)):
            return
        file = (self.checkpoint or _folder(args, state)) / LATENT
        if not file.is_file():
            warnings.warn(f"{file} is missing: training goes on from the bits, not from the weights.", stacklevel=2)
            return
        kept = load_file(file)
        for name, weight in latent.items():
            weight.copy_(kept[name])


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"


def _latent(model: nn.Module) -> dict[str, Tensor]:
    names = [name for edit in edits_of(model) if isinstance(edit, Binarize) for name in edit.weights(model)]
    return {name: model.get_parameter(name).detach() for name in names}


class KeepBest(TrainerCallback):
    """Keeps the weights of the epoch that was best on validation.

    Args:
        judge: scores the model, in evaluation mode; more is better.
        folder: where they are kept, so that a run that is killed goes on with them.
    """

    def __init__(self, judge: Callable[[PreTrainedModel], float], folder: Path) -> None:
        self.judge = judge
        self.file = folder / BEST
        self.scores: dict[str, float] = {}

    def kept(self) -> dict[str, float]:
        """The score of every epoch so far, by its last step."""
        notes = self.file.with_suffix(".json")
        found: dict[str, float] = json.loads(notes.read_text()) if notes.is_file() else {}
        return found

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Forget the epochs that a killed run will see again; score the one after whose last step it was killed."""
        self.scores = {step: score for step, score in self.kept().items() if int(step) <= state.global_step}
        epoch = state.max_steps / args.num_train_epochs
        if state.global_step and state.global_step % epoch == 0:
            self.on_epoch_end(args, state, control, model)

    def on_epoch_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: Any = None,
        **_: Any,
    ) -> None:
        """Score the epoch, and keep its weights if they are the best so far."""
        if str(state.global_step) in self.scores:
            return
        with _without_autocast(model):
            score = self.judge(model.eval())
        model.train()
        best, self.scores[str(state.global_step)] = max(self.scores.values(), default=-torch.inf), score
        if not state.is_world_process_zero:
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        if score > best:
            fresh = self.file.with_suffix(".tmp")
            save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, fresh)
            os.replace(fresh, self.file)
        notes = self.file.with_suffix(".json")
        notes.with_suffix(".new").write_text(json.dumps(self.scores))
        os.replace(notes.with_suffix(".new"), notes)

    def restore(self, model: nn.Module) -> None:
        """Give a model the best weights, if any epoch had a score: those of the first process, in every process."""
        parallel = distributed.is_available() and distributed.is_initialized()
        if (not parallel or distributed.get_rank() == 0) and self.file.is_file():
            model.load_state_dict(load_file(self.file))
        if parallel:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)


@contextmanager
def _without_autocast(model: nn.Module) -> Iterator[None]:
    """The forward pass that a model has without its trainer, for a while."""
    wrapped, plain = model.__dict__.get("forward"), model.__dict__.get("_original_forward")
    if plain is not None:
        model.forward = plain
    try:
        yield
    finally:
        if plain is not None:
            model.forward = wrapped  # type: ignore[assignment]
