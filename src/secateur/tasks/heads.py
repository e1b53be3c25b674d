"""A model and a tokenizer made ready for a task: opened in float32, with a head of the right size and named labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification

from secateur.errors import InvalidModel
from secateur.hub import carry_edits, open_model, open_tokenizer
from secateur.tasks.task import Task, label_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def head_class(task: Task) -> Any:
    """The transformers class that opens a model with a head for a task."""
    return (
        AutoModelForTokenClassification if task.kind == "token_classification" else AutoModelForSequenceClassification
    )


def open_base(
    model: str | Path | PreTrainedModel, tokenizer: str | Path | PreTrainedTokenizerBase | None, task: Task
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return a float32 classifier for a task, with its labels in the config, and the tokenizer.

    Args:
        model: folder, hub id or live model; a head of another size is replaced by a new one.
        tokenizer: of the model; read from the model's folder if None.
        task: decides the head.

    Raises:
        InvalidModel: if one of them cannot be opened.
    """
    where = model if isinstance(model, str | Path) else getattr(model.config, "_name_or_path", "")
    source = where if tokenizer is None else tokenizer
    tokens = open_tokenizer(source) if isinstance(source, str | Path) else source
    labels = label_config(task)
    cls = head_class(task)
    net = _open_model(model, labels, cls) if isinstance(model, str | Path) else _with_head(model, labels, cls)
    for name, value in labels.items():
        setattr(net.config, name, value)
    share_padding(net, tokens)
    if any(p.is_floating_point() and p.dtype != torch.float32 for p in net.parameters()):
        nn.Module.float(net)  # transformers refuses its own `float` for models with edits
    return net, tokens


def share_padding(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Give both the same padding token where one has none (GPT-2): without it a batch is refused."""
    if tokenizer.pad_token is None and tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def _open_model(source: str | Path, labels: dict[str, Any], cls: Any) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(str(source))
    except (OSError, ValueError):
        return open_model(source, cls)  # says what is wrong
    other_head = config.num_labels != labels["num_labels"]
    for name, value in labels.items():
        setattr(config, name, value)
    return open_model(source, cls, config=config, ignore_mismatched_sizes=other_head)


def _with_head(model: PreTrainedModel, labels: dict[str, Any], cls: Any) -> PreTrainedModel:
    """Return the live model itself if its head fits, else its body under a new head."""
    head = cls.__name__.removeprefix("AutoModel")
    if head in type(model).__name__ and model.config.num_labels == labels["num_labels"]:
        return model
    for name, value in labels.items():
        setattr(model.config, name, value)
    try:
        net: PreTrainedModel = cls.from_config(model.config)
    except ValueError as error:
        raise InvalidModel(f"{type(model).__name__} has no class {head} in transformers: use another model") from error
    body: nn.Module = model.base_model
    if getattr(net.base_model, "pooler", None) is None and getattr(body, "pooler", None) is not None:
        body.pooler = None  # type: ignore[assignment]  # else it is saved, and transformers wonders
    setattr(net, net.base_model_prefix, body)
    carry_edits(model, net)
    return net
