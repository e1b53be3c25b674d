"""More text to distil on: training rows whose words are replaced by similar ones."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from secateur.tasks.task import Task

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

PIECES = re.compile(r"\w+|\W+")
CHUNK = 1024  # words whose neighbours are looked for at once


def with_replaced_words(
    task: Task,
    tokenizer: PreTrainedTokenizerBase,
    embeddings: Tensor,
    copies: int,
    *,
    seed: int = 0,
    share: float = 0.4,
    nearest: int = 15,
) -> Task:
    """Add copies of the training rows in which words are replaced (TinyBERT, arXiv 1909.10351, algorithm 1).

    A word that is one token of letters is replaced with probability `share`, by one of the `nearest` such words by the
    cosine of their embeddings, each as likely. TinyBERT asks a masked language model for words of one token and GloVe
    for others, which stay here. A copy keeps its row's label, which may no longer be right: distil on it.

    Args:
        task: of texts, pairs of texts or lists of words.
        tokenizer: of the model.
        embeddings: its table of words, (vocabulary, width).
        copies: of each row.
        seed: of every random choice.
        share: probability that a word is replaced.
        nearest: words that one is replaced by.

    Returns:
        The task with (1 + copies) times the training rows, those given first.

    Raises:
        InvalidData: the task has no training rows.
    """
    from datasets import Dataset, concatenate_datasets

    rows = task.split("train").select_columns([*task.text_columns, task.label_column])
    similar = _neighbours(rows, task, tokenizer, embeddings, nearest)
    draw = random.Random(seed)
    parts = [rows]
    for _ in range(copies):
        columns = {
            column: [_replaced(text, similar, share, draw) for text in rows[column][:]] for column in task.text_columns
        }
        columns[task.label_column] = list(rows[task.label_column][:])
        parts.append(Dataset.from_dict(columns, features=rows.features))
    return replace(task, train=concatenate_datasets(parts))


def _replaced(text: Any, similar: dict[str, list[str]], share: float, draw: random.Random) -> Any:
    """A text, or a list of words, with some words replaced."""
    if not isinstance(text, str):
        return [_replaced(word, similar, share, draw) if word in similar else word for word in text]
    pieces = PIECES.findall(text)
    return "".join(draw.choice(similar[p]) if p in similar and draw.random() < share else p for p in pieces)


def _neighbours(
    rows: Dataset, task: Task, tokenizer: PreTrainedTokenizerBase, embeddings: Tensor, nearest: int
) -> dict[str, list[str]]:
    """For each word of the rows that is one token, the words with the nearest embeddings."""
    tokens = tokenizer.batch_decode([[i] for i in range(min(len(tokenizer), len(embeddings)))])
    known = _words(tokenizer, [token.strip() for token in tokens])
    names = {index: word for word, index in known.items()}
    ids = torch.tensor(sorted(names), device=embeddings.device)
    if len(ids) <= nearest:
        return {}
    texts = [text for column in task.text_columns for text in rows[column][:]]
    found = {piece for text in texts for piece in (PIECES.findall(text) if isinstance(text, str) else text)}
    wanted = {word: index for word, index in _words(tokenizer, sorted(found)).items() if index in names}
    units = normalize(embeddings.detach()[ids].float(), dim=-1)
    place = {index: position for position, index in enumerate(ids.tolist())}
    similar: dict[str, list[str]] = {}
    words = list(wanted)
    for start in range(0, len(words), CHUNK):
        some = words[start : start + CHUNK]
        own = torch.tensor([place[wanted[word]] for word in some], device=ids.device)
        cosines = units[own] @ units.T
        cosines[torch.arange(len(own)), own] = -torch.inf
        best = ids[cosines.topk(nearest).indices].tolist()
        similar |= {word: [names[index] for index in row] for word, row in zip(some, best, strict=True)}
    return similar


def _words(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> dict[str, int]:
    """Those texts that are letters and, after a space, one token; with that token."""
    letters = [text for text in dict.fromkeys(texts) if text.isalpha()]
    if not letters:
        return {}
    encoded = tokenizer([f" {text}" for text in letters], add_special_tokens=False)["input_ids"]
    return {text: ids[0] for text, ids in zip(letters, encoded, strict=True) if len(ids) == 1}
