"""A model that is no longer finite is not kept: the checkpoint before it is the last good one."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import InvalidModel


class StopsWhenDiverged(TrainerCallback):
    """Stops before a checkpoint of a model with weights that are not finite would be written, and at the end."""

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Look, if a checkpoint is due."""
        if model is not None and control.should_save:
            check_finite(model, state.global_step)

    def on_train_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Look."""
        if model is not None:
            check_finite(model, state.global_step)


def check_finite(model: nn.Module, step: int) -> None:
    """Refuse a model with weights that are not finite.

    Raises:
        InvalidModel: names the first, and what to try.
    """
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise diverged(step, f" ({name} is not finite)")


def diverged(step: int, what: str = "") -> InvalidModel:
    """The error."""
    return InvalidModel(f"training diverged at step {step}{what}: lower lr (--lr), or turn bf16 off")
