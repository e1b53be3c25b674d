"""Losses of compression: the task's own, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from secateur.errors import SecateurError
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
        device = _logits(found)[0].device
        if teacher.device != device:
            nn.Module.to(teacher, device)
        decodes = teacher.config.is_encoder_decoder  # what it reads follows from the labels
        with torch.no_grad():
            wanted = teacher(**{name: tensor for name, tensor in batch.items() if decodes or name != "labels"})
        pairs = [_counted(*pair, batch) for pair in _pairs(found, wanted)]
        distance = torch.stack([output_distance(*pair, temperature) for pair in pairs]).mean()
        loss: torch.Tensor = (1 - weight) * found.loss + weight * distance
        return loss

    return objective


def imitated(teacher: PreTrainedModel) -> Objective:
    """BiT's loss, without labels: distance of the outputs and of every hidden state to a teacher's (spec 4).

    Outputs: the mean over examples and classes of the cross-entropy to the teacher's probabilities, less the teacher's
    own entropy, which has no gradient; or the squared difference where there is one output. Hidden states: the sum over
    embeddings and layers of the mean squared difference, over real tokens.

    Args:
        teacher: as wide and as deep as the student; it is used in evaluation mode and without gradients.
    """
    teacher.eval().requires_grad_(False)

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        check_teacher(model, teacher)
        inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
        found = model(**inputs, output_hidden_states=True)
        if teacher.device != found.hidden_states[0].device:
            teacher.to(found.hidden_states[0].device)
        with torch.no_grad():
            wanted = teacher(**inputs, output_hidden_states=True)
        pairs = [_counted(*pair, batch) for pair in _pairs(found, wanted)]
        loss = torch.stack([output_distance(*pair, 1.0) / pair[0].shape[-1] for pair in pairs]).sum()
        for one, other in zip(found.hidden_states, wanted.hidden_states, strict=True):
            loss = loss + nn.functional.mse_loss(_real(one, inputs), _real(other, inputs))
        return loss

    return objective


def check_teacher(model: nn.Module, teacher: PreTrainedModel) -> None:
    """Refuse a teacher whose outputs, words or hidden states are not those of the student.

    Raises:
        SecateurError: names the first that differs.
    """
    config = getattr(getattr(model, "module", model), "config", None)
    if teacher.config.problem_type == "multi_label_classification":
        raise SecateurError("A softmax says nothing of several labels at once: distil with a loss of your own.")
    for name in ("vocab_size", "num_labels", "hidden_size", "num_hidden_layers"):
        mine, other = getattr(config, name, None), getattr(teacher.config, name, None)
        if mine != other:
            raise SecateurError(f"The teacher has {name} {other}, the student {mine}: distil from a model like it.")


def _logits(outputs: Any) -> list[torch.Tensor]:
    """A head's outputs: one tensor, or where an answer starts and where it ends."""
    if hasattr(outputs, "start_logits"):
        return [outputs.start_logits, outputs.end_logits]
    if not hasattr(outputs, "logits"):
        raise SecateurError("The model's outputs have no logits to compare with a teacher's: give a loss of your own.")
    return [outputs.logits]


def _pairs(found: Any, wanted: Any) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """The outputs of a student, each with its teacher's.

    Raises:
        SecateurError: they are of different heads.
    """
    mine, other = _logits(found), _logits(wanted)
    if [logits.shape for logits in mine] != [logits.shape for logits in other]:
        shapes = [" and ".join(str(tuple(each.shape)) for each in each_one) for each_one in (other, mine)]
        raise SecateurError(
            f"The teacher's outputs are {shapes[0]}, the student's {shapes[1]}: distil from a model with the same head."
        )
    return list(zip(mine, other, strict=True))


def _counted(
    logits: torch.Tensor, wanted: torch.Tensor, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs of a student and its teacher; of a class for each word only those that count."""
    if logits.dim() == 3:
        if "labels" not in batch:
            raise SecateurError("Outputs for each word need labels, which say what words count.")
        counted = batch["labels"] != IGNORED
        return logits[counted], wanted[counted]
    return logits, wanted


def _real(states: torch.Tensor, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of tokens that are no padding, (tokens, width)."""
    mask = inputs.get("attention_mask")
    return states if mask is None else states[mask.bool()]


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
