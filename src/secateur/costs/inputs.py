"""Inputs for measuring a model: what is in them does not matter, their shape does."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import InvalidData

SPECIAL_IDS = ("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id", "mask_token_id")


def dummy_inputs(model: nn.Module, batch: int, tokens: int) -> dict[str, Tensor]:
    """Seeded random inputs for a text or an image model.

    Args:
        model: a transformers model.
        batch: examples.
        tokens: length of every text, without padding; encoder-decoders read as many decoder tokens. Image models ignore
            it: their length follows from the image size.

    Returns:
        `input_ids` and an `attention_mask` of ones, (batch, tokens), and `decoder_input_ids` for encoder-decoders;
        or `pixel_values`, (batch, channels, height, width).

    Raises:
        InvalidData: batch or tokens are not positive, or more tokens than the model has positions.
    """
    if batch < 1 or tokens < 1:
        raise InvalidData(f"batch={batch}, tokens={tokens}: both must be at least 1.")
    config: Any = model.config
    generator = torch.Generator().manual_seed(0)
    parameter = next(model.parameters())
    if getattr(model, "main_input_name", "input_ids") == "pixel_values":
        size = config.image_size
        height, width = size if isinstance(size, (tuple, list)) else (size, size)
        pixels = torch.randn(batch, config.num_channels, height, width, generator=generator)
        return {"pixel_values": pixels.to(parameter.device, parameter.dtype)}
    check_length(model, tokens)
    special = sorted(special_ids(config))
    ids = torch.randint(0, config.vocab_size - len(special), (batch, tokens), generator=generator)
    for token in special:  # step over every special id, lowest first
        ids += ids >= token
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "decoder_input_ids" in inspect.signature(model.forward).parameters:
        # BART's classifier reads the state at the one end-of-sequence token
        if isinstance(config.eos_token_id, int):
            ids[:, -1] = config.eos_token_id
        inputs["decoder_input_ids"] = ids.clone()
    return {name: tensor.to(parameter.device) for name, tensor in inputs.items()}


def special_ids(config: Any) -> set[int]:
    """Token ids with a meaning of their own (padding, end, mask) within the vocabulary."""
    ids = (getattr(config, name, None) for name in SPECIAL_IDS)
    return {i for i in ids if isinstance(i, int) and 0 <= i < config.vocab_size}


def check_length(model: nn.Module, tokens: int) -> None:
    """Raise `InvalidData` if the model's learned position table is shorter than `tokens`."""
    positions = most_tokens(model)
    if tokens > positions:
        raise InvalidData(f"tokens={tokens} is more than this model's {positions} positions: use fewer tokens.")


def most_tokens(model: nn.Module) -> int:
    """Tokens that a model's learned position table has room for; a very large number if it has none."""
    most = sys.maxsize
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and ("position" in name or name.endswith("wpe")):
            # RoBERTa and BART keep the first rows of the table for padding
            padding = 0 if module.padding_idx is None else module.padding_idx + 1
            most = min(most, module.num_embeddings - int(getattr(module, "offset", padding)))
    return most


def run(model: nn.Module, inputs: dict[str, Tensor]) -> Any:
    """One forward pass without a key-value cache, as scoring or classifying a text needs it."""
    if "use_cache" in inspect.signature(model.forward).parameters:
        return model(**inputs, use_cache=False)
    return model(**inputs)
