"""The native engine's logits and metric against the model's own, on whole validation sets.

    python benchmarks/engine_quality.py
    python benchmarks/engine_quality.py --tasks sst2 --trained out    # a folder that `compress --method late` wrote

The dial is LATE's profile of 512 training rows, without training: what counts is that both eliminate the same tokens.
Or it is that of a trained model. Cosines are of all logits of a validation set.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from common import HERE, real, setting, write

from secateur import Late, hub
from secateur.edits import apply_edits
from secateur.edits.tokens import dial_of
from secateur.runtime import load
from secateur.tasks import batches, evaluate
from secateur.tasks.metrics import compute

PRECISIONS = ("fp32", "bf16", "int8")


def table(record: dict[str, Any]) -> str:
    """Metric, and cosine of the logits to the model's."""
    lines = ["| task | speed-up | torch | " + " | ".join(PRECISIONS) + " |", "|---" * (3 + len(PRECISIONS)) + "|"]
    for row in record["rows"]:
        cells = [f"{100 * row[p]:.2f} ({_cosine(row[f'{p} cosine'])})" for p in PRECISIONS]
        lines.append(f"| {row['task']} | {row['speedup']:g}× | {100 * row['torch']:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cosine(value: float) -> str:
    return "1" if value > 1 - 1e-7 else f"{value:.4f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tasks", nargs="+", default=["sst2", "stsb"])
    parser.add_argument("--speedups", nargs="+", type=float, default=[1.0, 1.5, 2.0])
    parser.add_argument("--trained", help="folder of a model with a dial, of the one task")
    args = parser.parse_args()
    path = HERE / "results" / "engine_quality.json"
    names = [f"{name}, trained dial" if args.trained else name for name in args.tasks]
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    rows = [row for row in kept if row["task"] not in names]
    for name, label in zip(args.tasks, names, strict=True):
        model, tokenizer, task = real(name)
        if args.trained:
            model = hub.open_any(args.trained).eval()
        else:
            inputs = list(batches(task, "train", tokenizer, batch_size=32, limit=512))
            edit = Late().edit(model, inputs, tokens=64)
            apply_edits(model, [edit])
            hub.attach(model, [edit])
        columns = [task.split("validation")[column] for column in task.text_columns]
        texts = [text[0] if len(text) == 1 else text for text in zip(*columns, strict=True)]
        for speedup in args.speedups:
            dial_of(model).speedup = speedup
            wanted = evaluate(model, tokenizer, task)
            row = {"task": label, "speedup": speedup, "torch": wanted.metrics[task.metric]}
            for precision in PRECISIONS:
                with load(model, precision, tokenizer=tokenizer) as engine:
                    logits = torch.cat([engine(texts[i : i + 64]) for i in range(0, len(texts), 64)])
                cosine = torch.cosine_similarity(logits.flatten().double(), wanted.logits.flatten().double(), dim=0)
                row[precision] = compute(task, logits, wanted.labels)[task.metric]
                row[f"{precision} cosine"] = float(cosine)
                row[f"{precision} apart"] = float((logits - wanted.logits).abs().max())
            rows.append(row)
            print(row, flush=True)
    write(path, {"setting": setting(), "rows": rows})


if __name__ == "__main__":
    main()
