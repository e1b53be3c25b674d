"""What becomes of the zeros of a model, whoever made them: stored as bits, or cut out if whole units are zero."""

from __future__ import annotations

import warnings

import torch
from transformers import PreTrainedModel

from secateur import hub
from secateur.edits import Slice, apply_edits
from secateur.edits.slice import nonzero_units
from secateur.edits.sparsify import sparsified
from secateur.errors import SecateurError
from secateur.sparsity.storage import Values, encode
from secateur.sparsity.weights import prunable, sparsity, stored_block


def sparsify(model: PreTrainedModel, values: Values | None = None, block: tuple[int, int] = (1, 1)) -> PreTrainedModel:
    """Let `save_pretrained` store the zeros of a model's linear maps as bits.

    Args:
        model: a model of a known family, pruned by whatever means; it is changed in place.
        values: how the other weights are stored: "fp32", "bf16" or "int8"; "bf16" for a model in bfloat16 and "fp32"
            for others if None.
        block: outputs × inputs that are zero together.

    Returns:
        The same model.

    Raises:
        SecateurError: none of its weights is zero. Too few for a smaller file give a warning.
    """
    weights = prunable(model)
    if not any(bool((weight == 0).any()) for weight in weights.values()):
        raise SecateurError("No weight of the layers' maps is zero: prune the model first, or the file grows.")
    name, weight = next(iter(weights.items()))
    values = values or ("bf16" if weight.dtype == torch.bfloat16 else "fp32")
    block = stored_block(model, name, block)
    parts = [part for each in weights.values() for part in encode(each.detach(), values, block).values()]
    dense = sum(each.nbytes for each in weights.values())
    if (stored := sum(part.nbytes for part in parts)) >= dense:
        warnings.warn(
            f"{sparsity(weights):.1%} of the weights are zero: with values in {values} the maps take {stored:,} bytes "
            f"instead of {dense:,}. Prune more, or leave the model as it is.",
            stacklevel=2,
        )
    hub.attach(model, [sparsified(weights, values, block)])
    return model


def slice_zeros(model: PreTrainedModel) -> PreTrainedModel:
    """Cut out the heads and neurons whose weights are zero, so that the model is smaller and faster everywhere.

    Args:
        model: a model of a known family, pruned by whatever means; it is changed in place.

    Returns:
        The same model, with the same outputs.

    Raises:
        SecateurError: no head and no neuron is zero.
    """
    kept = nonzero_units(model)
    if kept.keeps_everything:
        raise SecateurError("No head or neuron of the model is zero: prune whole ones, with the pattern 'units'.")
    edits = [Slice(kept)]
    apply_edits(model, edits)
    hub.attach(model, edits)
    return model
