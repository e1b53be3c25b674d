"""A long-text task out of data at hand: the sentiment of one sentence among sentences of an encyclopedia.

Each text holds about 200 words of WikiText-2, in whole sentences in their order, and one sentence of SST-2 between two
of them; its label is that sentence's. Training texts are made of WikiText's validation lines, the others of its test
lines. The same rows come out every time.
"""

from __future__ import annotations

import random
from pathlib import Path

from datasets import Dataset, load_dataset

from secateur.tasks import Task, load_task

WORDS = 200
LEAST = 8  # words of a sentence: training rows of SST-2 are mostly phrases
ROWS = {"train": 3000, "validation": 400, "test": 400}


def long_texts(shared: Path) -> Task:
    """The task, from `<shared>/data/{sst2,wikitext2}`."""
    short = load_task("sst2")
    made = {}
    for split, rows in ROWS.items():
        lines = _sentences(shared, "validation" if split == "train" else "test")
        data = short.split(split)
        texts, labels = [], []
        for row in data.shuffle(seed=0):
            sentence = row[short.text_columns[0]].strip()
            if len(texts) < rows and len(sentence.split()) >= LEAST:
                draw = random.Random(f"{split}/{len(texts)}")
                texts.append(_hide(sentence, lines, draw))
                labels.append(row[short.label_column])
        made[split] = Dataset.from_dict({"text": texts, "label": labels})
    return Task(
        "long", made["train"], made["validation"], made["test"], ("text",), "label", "classification", 2,
        short.label_names, "accuracy", ("accuracy",),
    )  # fmt: skip


def _sentences(shared: Path, split: str) -> list[str]:
    rows = load_dataset("parquet", data_files=str(shared / "data" / "wikitext2" / f"{split}.parquet"), split="train")
    lines = [row["text"].strip() for row in rows]
    return [
        f"{sentence} ."
        for line in lines
        if not line.startswith("=")
        for sentence in line.removesuffix(".").strip().split(" . ")
        if sentence
    ]


def _hide(sentence: str, lines: list[str], draw: random.Random) -> str:
    start = draw.randrange(len(lines) - WORDS)
    found: list[str] = []
    while sum(len(line.split()) for line in found) < WORDS - len(sentence.split()):
        found.append(lines[start + len(found)])
    found.insert(draw.randrange(len(found) + 1), sentence)
    return " ".join(found)
