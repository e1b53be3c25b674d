"""A tiny BERT, a word-level tokenizer and a toy task, made on the spot."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, TrainerCallback

from secateur.tasks import Task, load_task
from secateur.train import finetune

GOOD, BAD = ("good", "fine", "great"), ("bad", "poor", "awful")
FILLER = ("the", "film", "is", "very", "a", "and", "so", "it", "was", "plot")
SETTINGS: dict[str, Any] = dict(epochs=3, lr=1e-3, batch_size=8, max_length=32, bf16=False)


def tokenizer() -> PreTrainedTokenizerFast:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *GOOD, *BAD, *FILLER]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=64,
    )


def model(num_labels: int = 2, seed: int = 0, **config: Any) -> BertForSequenceClassification:
    torch.manual_seed(seed)
    settings = BertConfig(
        vocab_size=20,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=64,
        num_labels=num_labels,
        **config,
    )
    return BertForSequenceClassification(settings).eval()


def sentences(count: int, seed: int = 0) -> tuple[list[str], list[str]]:
    """Texts of various lengths and their labels, `good` and `bad`."""
    generator = torch.Generator().manual_seed(seed)

    def pick(words: tuple[str, ...]) -> str:
        return words[int(torch.randint(len(words), (1,), generator=generator))]

    texts, labels = [], []
    for i in range(count):
        length = int(torch.randint(3, 28, (1,), generator=generator))
        words = [pick(FILLER) for _ in range(length)]
        words.insert(length // 2, pick(GOOD if i % 2 else BAD))
        texts.append(" ".join(words))
        labels.append("good" if i % 2 else "bad")
    return texts, labels


def task(train: int = 40, validation: int = 30) -> Task:
    splits = {}
    for seed, (name, count) in enumerate({"train": train, "validation": validation}.items()):
        texts, labels = sentences(count, seed)
        splits[name] = Dataset.from_dict({"text": texts, "label": labels})
    return load_task(DatasetDict(splits))


class Kill(TrainerCallback):
    """Ends the process without any chance to clean up, before the given step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":  # a run that is killed: python -m tests.unit.tiny_text BASE OUT STEP
    torch.set_num_threads(1)
    base, out, step = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    finetune(base, None, task(), out, **SETTINGS, checkpoint_seconds=0, callbacks=[Kill(step)])
