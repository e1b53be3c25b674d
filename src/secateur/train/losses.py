"""Losses of compression: the task's own, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeAlias

import torch
from torch import nn

from secateur.tasks.tagging import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Objective: TypeAlias = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
"""A loss: from the model and a batch with `labels` to a scalar."""


def distilled(teacher: PreTrainedModel, weight: float, temperature: float = 2.0) -> Objective:
    """The task's loss and the distance to a teacher's outputs: (1 - weight) · task + weight · distillation.

    The distance is T² · KL(teacher ‖ student) of the outputs at temperature T (Hinton et al., arXiv 1503.02531, §2), or
    the squared difference where there is one output.

    Args:
        teacher: gives the wanted outputs, in evaluation mode and without gradients.
        weight: of the distillation, from 0 to 1.
        temperature: T.
    """
    teacher.eval().requires_grad_(False)

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        found = model(**batch)
        if teacher.device != found.logits.device:
            teacher.to(found.logits.device)
        with torch.no_grad():
            wanted = teacher(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        logits = found.logits
        if logits.dim() == 3:  # a class for each word
            counted = batch["labels"] != IGNORED
            logits, wanted = logits[counted], wanted[counted]
        loss: torch.Tensor = (1 - weight) * found.loss + weight * output_distance(logits, wanted, temperature)
        return loss

    return objective


def output_distance(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """T² · KL(teacher ‖ student) at temperature T, mean over examples; the squared difference of single outputs.

    Args:
        student: logits, (examples, outputs).
        teacher: logits of the same shape.
        temperature: T.
    """
    if student.shape[-1] == 1:
        return nn.functional.mse_loss(student, teacher)
    wanted, found = (torch.log_softmax(logits.float() / temperature, dim=-1) for logits in (teacher, student))
    return temperature**2 * nn.functional.kl_div(found, wanted, reduction="batchmean", log_target=True)
