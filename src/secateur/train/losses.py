"""Losses of compression: the task's own, and the distance to a teacher."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from secateur.families import family_of
from secateur.tasks.tagging import IGNORED
from secateur.tokens.state import CURRENT

if TYPE_CHECKING:
    from transformers import PreTrainedModel

Objective: TypeAlias = Callable[[nn.Module, dict[str, torch.Tensor]], torch.Tensor]
"""A loss: from the model and a batch with `labels` to a scalar."""


def distilled(teacher: PreTrainedModel, weight: float, temperature: float = 2.0, *, states: float = 0.0) -> Objective:
    """The task's loss and the distance to a teacher's outputs: (1 - weight) · task + weight · distillation.

    The distance is T² · KL(teacher ‖ student) of the outputs at temperature T (Hinton et al., arXiv 1503.02531, §2), or
    the squared difference where there is one output. With `states`, the distance of every layer's hidden states to the
    teacher's is added (`state_distance`).

    Args:
        teacher: gives the wanted outputs, in evaluation mode and without gradients.
        weight: of the distillation, from 0 to 1.
        temperature: T.
        states: weight of the distance of hidden states, beside the other two.
    """
    teacher.eval().requires_grad_(False)

    def objective(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        device = batch["input_ids"].device
        if teacher.device != device:
            nn.Module.to(teacher, device)
        with torch.no_grad(), outputs_of_layers(teacher) as there:
            wanted = teacher(**{name: tensor for name, tensor in batch.items() if name != "labels"}).logits
        real = batch.get("attention_mask", torch.ones_like(batch["input_ids"])).bool()
        with state_distances(model, there if states else [], real) as distances:
            found = model(**batch)
        logits = found.logits
        if logits.dim() == 3:  # a class for each word
            counted = batch["labels"] != IGNORED
            logits, wanted = logits[counted], wanted[counted]
        loss: torch.Tensor = (1 - weight) * found.loss + weight * output_distance(logits, wanted, temperature)
        return loss + states * torch.stack(distances).mean() if distances else loss

    return objective


@contextmanager
def outputs_of_layers(model: nn.Module) -> Iterator[list[torch.Tensor]]:
    """Hidden states after each layer of a dense pass within the context, (batch, tokens, d) each."""
    found: list[torch.Tensor] = []
    handles = [
        layer.register_forward_hook(lambda module, args, output: found.append(_hidden(output)))
        for layer in transformer_layers(model)
    ]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def state_distances(
    model: nn.Module, wanted: Sequence[torch.Tensor], real: torch.Tensor
) -> Iterator[list[torch.Tensor]]:
    """For each layer the squared distance of its hidden states to wanted ones, over the variance of those.

    Only tokens that the layer hands on count, and no padding (TinyBERT, Jiao et al., arXiv 1909.10351, eq. 8, without
    the projection, since both have one width).

    Args:
        model: run once within the context, with its dial anywhere.
        wanted: states after each layer, (batch, tokens, d); nothing is compared if there are none.
        real: True for real tokens, (batch, tokens).
    """
    found: list[torch.Tensor] = []
    layers = transformer_layers(model) if wanted else []

    def compare(module: nn.Module, args: Any, output: Any) -> None:
        hidden, target = _hidden(output), wanted[len(found)]
        now = CURRENT.get()
        if now is None:
            hidden, target = hidden[real], target[real]
        else:
            last = len(found) + 1 == len(layers)  # every token is back at its place
            hidden = now.layout.of_slots(hidden) if last else now.layout.packed_rows(hidden)
            target = now.layout.of_slots(target)
        distance = (hidden - target).square().mean()
        found.append(distance / target.var().clamp_min(torch.finfo(target.dtype).tiny))

    handles = [layer.register_forward_hook(compare) for layer in layers]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def transformer_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model of a known family, in order; also of one that is wrapped for data parallel training."""
    inner = getattr(model, "module", model)
    base = getattr(inner, "base_model", inner)
    return list(base.get_submodule(family_of(inner).stacks[0].layers).children())


def _hidden(output: Any) -> torch.Tensor:
    states: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return states


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
