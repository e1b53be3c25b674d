"""What pruning adds to a step of fine-tuning: the prior's gradient, the schedule and the choice of weights.

    python benchmarks/mgpp_cost.py        # some minutes

Blocks of ten steps with and without pruning run in turns on one model and the same batches (MiniLM-L6, STS-B, batches
of 32 sentence pairs). Each block with pruning holds one choice of weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from functools import partial
from typing import Any

import torch
from common import HERE, real, setting, write
from mgpp_quality import METHODS
from transformers import TrainerControl, TrainerState, TrainingArguments

from secateur.tasks import batches
from secateur.train import Pruning, PruningSettings

STEPS = 10


def run(
    model: Any, data: list[Any], optimizer: Any, pruning: Pruning, args: Any, state: Any, with_pruning: bool
) -> float:
    """Seconds of a block of steps."""
    control = TrainerControl()
    start = time.perf_counter()
    for batch in data[:STEPS]:
        if with_pruning:
            pruning.on_step_begin(args, state, control)
        model(**batch).loss.backward()
        if with_pruning:
            pruning.on_pre_optimizer_step(args, state, control)
        optimizer.step()
        if with_pruning:
            pruning.on_optimizer_step(args, state, control, optimizer=optimizer)
            state.global_step += 1
        optimizer.zero_grad()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["prior", "magnitude", "platon", "movement"])
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer, task = real("stsb")
    data = list(batches(task, "train", tokenizer, batch_size=32, shuffle=0, limit=32 * STEPS))
    model.train()
    args = TrainingArguments("unused", use_cpu=True, report_to="none")
    record: dict[str, Any] = {**setting(), "rows": []}
    for name in arguments.methods:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)
        state = TrainerState(max_steps=10**6, global_step=0)
        pruning = Pruning(0.9, PruningSettings(**METHODS[name], before=0.0, after=0.0, interval=STEPS))
        pruning.on_train_begin(
            args, state, TrainerControl(), model=model, train_dataloader=_Rows(len(task.train or ()))
        )

        block = partial(run, model, data, optimizer, pruning, args, state)
        block(True), block(False)
        pairs = [(block(True), block(False)) for _ in range(arguments.rounds)]
        ratios = sorted(a / b for a, b in pairs)
        row = {
            "method": name,
            "plain ms": round(1000 * statistics.median(b for _, b in pairs) / STEPS, 1),
            "ratio": round(statistics.median(ratios), 4),
            "lowest": round(ratios[0], 4),
            "highest": round(ratios[-1], 4),
        }
        record["rows"].append(row)
        print(json.dumps(row), flush=True)
    write(HERE / "results" / "mgpp_cost.json", record)


class _Rows:
    """Stands for a data loader over so many rows."""

    def __init__(self, count: int) -> None:
        self.dataset = range(count)


if __name__ == "__main__":
    main()
