"""Text to batches of tensors: sorted by length, padded to few distinct lengths."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from secateur.errors import InvalidData
from secateur.tasks.tagging import IGNORED, align

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from secateur.tasks.task import Task

PAD_MULTIPLE = 16  # tokens: few distinct shapes, so that kernels and allocators see each of them often
MAX_TOKENS = 512  # for tokenizers that state no limit
POOL = 32  # batches that are sorted by length together when training


class Batches(list[dict[str, Tensor]]):
    """Batches of model inputs, with `order[i]` the row in the data of the i-th example handed out."""

    def __init__(self, items: Sequence[dict[str, Tensor]], order: Sequence[int]) -> None:
        super().__init__(items)
        self.order = list(order)


@dataclass(frozen=True)
class Encoded:
    """A tokenised split.

    Attributes:
        columns: tokenizer output name → one list of ids per row.
        lengths: tokens of each row.
        labels: class ids or numbers; for token classification a list of class ids for each row, one per token.
        pad: value that fills each column up.
        left: True to pad on the left.
        longest: no row is padded beyond this.
        dtype: of the labels' tensor.
    """

    columns: dict[str, list[list[int]]]
    lengths: list[int]
    labels: list[Any]
    pad: dict[str, int]
    left: bool
    longest: int
    dtype: torch.dtype

    def __len__(self) -> int:
        return len(self.lengths)

    def collate(self, rows: Sequence[int], multiple: int = PAD_MULTIPLE) -> dict[str, Tensor]:
        """Return the batch of the given rows, padded to the longest, rounded up to a multiple of `multiple`."""
        longest = max(self.lengths[row] for row in rows)
        width = min(-(-longest // multiple) * multiple, max(self.longest, longest))
        batch = {}
        for name, values in self.columns.items():
            batch[name] = self._filled([values[row] for row in rows], width, self.pad[name])
        labels = [self.labels[row] for row in rows]
        tags = bool(labels) and isinstance(labels[0], list)
        batch["labels"] = self._filled(labels, width, IGNORED) if tags else torch.tensor(labels, dtype=self.dtype)
        return batch

    def _filled(self, rows: Sequence[list[int]], width: int, value: int) -> Tensor:
        """Lists of numbers as (rows, width), filled up on the tokenizer's side."""
        tensor = torch.full((len(rows), width), value, dtype=torch.long)
        for i, row in enumerate(rows):
            tensor[i, width - len(row) if self.left else 0 :][: len(row)] = torch.tensor(row, dtype=torch.long)
        return tensor


def token_limit(tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel | None = None) -> int:
    """Return how many tokens an input may have: the tokenizer's and the model's limit, at most `MAX_TOKENS`."""
    limits = [MAX_TOKENS, int(tokenizer.model_max_length)]
    positions = getattr(model.config, "max_position_embeddings", None) if model is not None else None
    if isinstance(positions, int) and positions > 0:
        limits.append(positions)
    return min(limits)


def encode(
    task: Task,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int | None = None,
    rows: Sequence[int] | None = None,
) -> Encoded:
    """Tokenise a split of a task.

    Args:
        task: the task.
        split: `"train"`, `"validation"` or `"test"`.
        tokenizer: of the model; pairs are encoded as the tokenizer does.
        max_length: tokens beyond this are cut off; the tokenizer's limit (at most 512) if None.
        rows: only these rows of the split, in this order.
    """
    data = task.split(split)
    if rows is not None:
        data = data.select(rows)
    longest = min(max_length or MAX_TOKENS, token_limit(tokenizer))
    texts = [list(data[column][:]) for column in task.text_columns]
    tags = task.kind == "token_classification"
    try:
        output = tokenizer(*texts, truncation=True, max_length=longest, is_split_into_words=tags)
    except (AssertionError, ValueError) as error:  # tokenizers that mark the space before a word
        raise InvalidData(
            f"the tokenizer takes no list of words ({error}): open it with add_prefix_space=True"
        ) from error
    labels = list(data[task.label_column][:])
    if tags:
        labels = [align(row, output.word_ids(i)) for i, row in enumerate(labels)]
    columns = {name: output[name] for name in tokenizer.model_input_names if name in output}
    pad = dict.fromkeys(columns, 0)
    pad["input_ids"] = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
    if "token_type_ids" in pad:
        pad["token_type_ids"] = int(getattr(tokenizer, "pad_token_type_id", 0))
    return Encoded(
        columns=columns,
        lengths=[len(ids) for ids in columns["input_ids"]],
        labels=labels,
        pad=pad,
        left=tokenizer.padding_side == "left",
        longest=longest,
        dtype=torch.float32 if task.kind == "regression" else torch.long,
    )


def batches(
    task: Task,
    split: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    batch_size: int = 32,
    max_length: int | None = None,
    shuffle: int | None = None,
    limit: int | None = None,
    buckets: bool = True,
) -> Batches:
    """Return a split as batches of model inputs with `labels`.

    Args:
        task: the task.
        split: `"train"`, `"validation"` or `"test"`.
        tokenizer: of the model.
        batch_size: examples in a batch.
        max_length: tokens beyond this are cut off; the tokenizer's limit (at most 512) if None.
        shuffle: seed of the order; None keeps the order of the data (or of the lengths).
        limit: use so many examples: drawn at random if `shuffle` is given, else the first ones.
        buckets: put examples of like length together.
    """
    rows = list(range(len(task.split(split))))
    if shuffle is not None:
        random.Random(shuffle).shuffle(rows)
    rows = rows[:limit]
    encoded = encode(task, split, tokenizer, max_length=max_length, rows=rows)
    order = list(range(len(rows)))
    if buckets:
        order.sort(key=lambda row: encoded.lengths[row])
    groups = [order[i : i + batch_size] for i in range(0, len(order), batch_size)]
    if buckets and shuffle is not None:
        random.Random(shuffle + 1).shuffle(groups)
    return Batches([encoded.collate(group) for group in groups], [rows[row] for group in groups for row in group])


def median_tokens(task: Task, tokenizer: PreTrainedTokenizerBase, *, sample: int = 2000) -> int:
    """Return the median number of tokens of the task's real inputs (of the first `sample` validation or other rows)."""
    split = "validation" if task.validation is not None else next(iter(task.splits()))
    rows = range(min(sample, len(task.split(split))))
    return int(statistics.median_high(encode(task, split, tokenizer, rows=rows).lengths))


class BucketSampler:
    """Batches of rows for training: shuffled anew each epoch, examples of like length together.

    The order depends on the seed and the epoch alone, so that a resumed run sees the same batches.
    """

    drop_last = False  # read by accelerate when it shards batches over processes

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self.lengths = lengths
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return -(-len(self.lengths) // self.batch_size)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch whose order comes next."""
        self.epoch = epoch

    def __iter__(self) -> Iterator[list[int]]:
        generator = random.Random(f"{self.seed}/{self.epoch}")
        rows = list(range(len(self.lengths)))
        generator.shuffle(rows)
        pool = self.batch_size * POOL
        groups: list[list[int]] = []
        for start in range(0, len(rows), pool):
            part = sorted(rows[start : start + pool], key=lambda row: self.lengths[row])
            groups += [part[i : i + self.batch_size] for i in range(0, len(part), self.batch_size)]
        generator.shuffle(groups)
        yield from groups
