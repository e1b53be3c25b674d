"""What the verbs are given: models, tokenizers, lengths, rows to judge by."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeAlias

from datasets import Dataset, DatasetDict
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import hub
from secateur.costs.latency import Timing
from secateur.errors import InvalidData, SecateurError
from secateur.families import sites
from secateur.tasks import Task, median_tokens
from secateur.tasks.batching import token_limit
from secateur.tasks.heads import head_class, share_padding

TaskLike: TypeAlias = str | Path | Dataset | DatasetDict | Task


def live(model: str | Path | PreTrainedModel) -> PreTrainedModel:
    """The model itself, or the one in a folder or under a hub id."""
    return model if isinstance(model, PreTrainedModel) else hub.open_any(model)


def opened(
    model: str | Path | PreTrainedModel, tokenizer: str | Path | PreTrainedTokenizerBase | None, data: Task
) -> tuple[str, PreTrainedModel, PreTrainedTokenizerBase]:
    """Where a model came from, the model with a head for the data, and its tokenizer."""
    if isinstance(model, PreTrainedModel):
        source, net = model.config._name_or_path or type(model).__name__, model
    else:
        source, net = str(model), hub.open_model(model, head_class(data), trained=True)
    sites(net)  # an unknown architecture is reported before anything is computed
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        words = tokenizer
    elif tokenizer is None and not net.config._name_or_path:
        raise SecateurError("A live model needs its tokenizer: give tokenizer=.")
    else:
        words = hub.open_tokenizer(tokenizer if tokenizer is not None else net.config._name_or_path)
    share_padding(net, words)
    return source, net, words


def length_of(data: Task, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: int | None) -> int:
    """The length at which MACs and latency count: as asked, else the task's median real length."""
    return tokens or min(median_tokens(data, tokenizer), token_limit(tokenizer, model))


def judged_by(data: Task, split: str | None) -> str:
    """The rows to judge by: as asked, else validation, else test."""
    if split is not None:
        data.split(split)
        return split
    for name in ("validation", "test"):
        if name in data.splits():
            return name
    raise InvalidData(f"task '{data.name}' has neither validation nor test rows to judge by: add a file of them.")


def setting_of(timing: Timing) -> dict[str, Any]:
    """The shape, threads and precision at which MACs and milliseconds count."""
    return {name: getattr(timing, name) for name in ("batch", "tokens", "threads", "dtype")}
