"""A model and a tokenizer made ready for a task: opened in float32, with a head of the right size and named labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from secateur.errors import InvalidModel
from secateur.tasks.task import Task, label_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def open_base(
    model: str | Path | PreTrainedModel, tokenizer: str | Path | PreTrainedTokenizerBase | None, task: Task
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a float32 sequence classifier for a task, with its labels in the config, and the tokenizer.

    Args:
        model: folder, hub id or live model; a head of another size is replaced by a new one.
        tokenizer: of the model; read from the model's folder if None.
        task: decides the head.

    Raises:
        InvalidModel: if one of them cannot be opened.
    """
    where = model if isinstance(model, str | Path) else getattr(model.config, "_name_or_path", "")
    tokens = _open_tokenizer(where if tokenizer is None else tokenizer)
    labels = label_config(task)
    net = _open_model(model, labels) if isinstance(model, str | Path) else _with_head(model, labels)
    for name, value in labels.items():
        setattr(net.config, name, value)
    if tokens.pad_token is None and tokens.eos_token is not None:
        tokens.pad_token = tokens.eos_token
    if getattr(net.config, "pad_token_id", None) is None:
        net.config.pad_token_id = tokens.pad_token_id
    return net.float(), tokens


def _open_tokenizer(source: str | Path | PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    if not isinstance(source, str | Path):
        return source
    try:
        tokens: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(str(source))
    except (OSError, ValueError) as error:
        raise InvalidModel(
            f"no tokenizer in {str(source)!r}: name the folder or hub id that has it with tokenizer= (--tokenizer)"
        ) from error
    return tokens


def _open_model(source: str | Path, labels: dict[str, Any]) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(str(source))
        other_head = config.num_labels != labels["num_labels"]
        for name, value in labels.items():
            setattr(config, name, value)
        net: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            str(source), config=config, dtype=torch.float32, ignore_mismatched_sizes=other_head
        )
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidModel(
            f"cannot open {str(source)!r} as a sequence classifier: {reason[:160]} - give a folder with config.json "
            "and model.safetensors, or a hub id"
        ) from error
    return net


def _with_head(model: PreTrainedModel, labels: dict[str, Any]) -> PreTrainedModel:
    """Return the live model itself if its head fits, else its body under a new head."""
    if "ForSequenceClassification" in type(model).__name__ and model.config.num_labels == labels["num_labels"]:
        return model
    for name, value in labels.items():
        setattr(model.config, name, value)
    try:
        net: PreTrainedModel = AutoModelForSequenceClassification.from_config(model.config)
    except ValueError as error:
        raise InvalidModel(
            f"{type(model).__name__} has no sequence classifier in transformers: use another model"
        ) from error
    body: nn.Module = model.base_model
    setattr(net, net.base_model_prefix, body)
    return net
