"""Binarize a model: ReLU, quantisers, calibration, and the edit that lets `save_pretrained` write bits."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import nullcontext

from torch import Tensor
from transformers import PreTrainedModel

from secateur import hub
from secateur.bits.modules import calibrate
from secateur.bits.quantizers import Estimate
from secateur.edits import Binarize, apply_edits
from secateur.edits.binarize import Embeddings, places
from secateur.edits.tokens import dial_of, has_dial
from secateur.errors import SecateurError


def binarize(
    model: PreTrainedModel,
    batches: Sequence[dict[str, Tensor]],
    bits: int = 1,
    *,
    mixed: Mapping[str, int] | None = None,
    embeddings: Embeddings = "1bit",
    rows: bool = False,
    two_sets: bool = True,
    relu: bool = True,
    calibration: Estimate = "search",
) -> PreTrainedModel:
    """Give a model 1-bit weights and activations of few bits, in place; it is to be trained afterwards.

    Args:
        model: a model of a family whose attention is plain products; a binary one gets other bits, calibrated anew. A
            dial stays where it stands.
        batches: inputs that the scales of activations are chosen by.
        bits: of activations: 1, 2, 4 or 8.
        mixed: other bits for the sites whose name a regular expression is found in; the last one that is counts.
        embeddings: the table of words: "float", "int8" or "1bit" (text models only).
        rows: a scale of the weights for each output instead of one for the map.
        two_sets: levels from 0 for what a ReLU gives, as for probabilities; else signed ones.
        relu: a ReLU in place of the model's activation in the feed-forward blocks; where one was put, it stays.
        calibration: "mean", "analytic" or "search" (`bits.quantizers.first_alpha`).

    Returns:
        The same model.

    Raises:
        SecateurError: bits are none of 1, 2, 4, 8, an expression fits no site, or nothing to calibrate on.
        UnsupportedModel: a family that cannot be binarized.
    """
    if not batches:
        raise SecateurError("There is nothing to calibrate on: give at least one batch of inputs.")
    relu = relu or any(edit.relu for edit in hub.edits_of(model) if isinstance(edit, Binarize))
    edit = Binarize(bits_of(model, bits, mixed or {}), embeddings, rows, two_sets, relu)
    apply_edits(model, [edit])
    with dial_of(model).at(0.0) if has_dial(model) else nullcontext():
        calibrate(model, batches, calibration)
    hub.attach(model, [edit])
    return model


def bits_of(model: PreTrainedModel, bits: int, mixed: Mapping[str, int]) -> dict[str, int]:
    """Bits of every site of a model, as `binarize` takes them.

    Raises:
        SecateurError: bits are none of 1, 2, 4, 8, or an expression fits no site.
    """
    sites = dict.fromkeys(places(model), bits)
    for pattern, count in mixed.items():
        named = [site for site in sites if _found(pattern, site)]
        if not named:
            raise SecateurError(f"mixed: '{pattern}' fits no site; there are such as {next(iter(sites))}.")
        sites |= dict.fromkeys(named, count)
    return Binarize(sites).bits


def _found(pattern: str, site: str) -> bool:
    try:
        return re.search(pattern, site) is not None
    except re.error as error:
        raise SecateurError(f"mixed: '{pattern}' is no regular expression: {error}.") from None
