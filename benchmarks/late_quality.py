"""Metric against speed-up: one model trained by LATE, its dial at several settings, and what else could be dropped.

    python benchmarks/late_quality.py --task stsb --seeds 0 1 2      # about a quarter of an hour per seed on one core
    python benchmarks/late_quality.py --task stsb --table     # print the table from the kept rows

All rows of a seed that eliminate tokens use the same counts per layer. The settings are chosen by nothing: each is
reported. SST-2 trains on a fixed subset (`--rows`). Other choices of tokens are tried on the first seed. Layer dropping
keeps the lowest layers and trains as long, with the same loss; its speed-up is that of the layers.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import HERE, real, seeds_table, setting, write
from torch import Tensor, nn
from transformers import set_seed

from secateur.costs.budget import Budget, constraints
from secateur.edits.tokens import dial_of
from secateur.methods import Late
from secateur.run import Job, Run
from secateur.tasks import Task, evaluate, median_tokens, paired_bootstrap
from secateur.tokens.layout import Layout
from secateur.train import Settings, bf16_pays, distilled, fit

SPEEDUPS = (1.0, 1.5, 2.0, 3.0, 4.0, 4.8)
COMPARED = (1.5, 2.0, 3.0)


def by_chance(seed: int) -> Callable[[int, Tensor, Layout], Tensor]:
    """Scores that depend on seed, layer and slot alone, so that an example is cut alike in every batch."""

    def chooser(layer: int, score: Tensor, layout: Layout) -> Tensor:
        drawn = torch.rand(4096, generator=torch.Generator().manual_seed(1000 * seed + layer))
        return drawn[layout.slots]

    return chooser


def first_ones(layer: int, score: Tensor, layout: Layout) -> Tensor:
    """Keep the first tokens."""
    return -layout.slots.float()


def variants(seed: int) -> dict[str, dict[str, Any]]:
    """Changes of the selection, on the trained model."""
    return {
        "scored as PoWER-BERT": {"weighting": "attention", "diagonal": False},
        "first tokens": {"chooser": first_ones},
        "random tokens": {"chooser": by_chance(seed)},
    }


class Shortened(nn.Module):
    """A dense model that reads the first 1/K of each text of an example, and the text's last token ([SEP])."""

    def __init__(self, model: Any, speedup: float) -> None:
        super().__init__()
        self.model = model
        self.speedup = speedup
        self.config, self.device, self.dtype = model.config, model.device, model.dtype

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor, **kwargs: Tensor) -> Any:
        """Cut, then run."""
        keep = torch.zeros_like(attention_mask, dtype=torch.bool)
        for kind in (0, 1):
            part = attention_mask.bool() & (token_type_ids == kind)
            place, length = part.cumsum(dim=1), part.sum(dim=1, keepdim=True)
            keep |= part & ((place <= torch.ceil(length / self.speedup) - 1) | (place == length))
        columns = (~keep).to(torch.uint8).argsort(dim=1, stable=True)[:, : int(keep.sum(dim=1).max())]
        mask = keep.gather(1, columns).long()
        cut = {"input_ids": input_ids, "token_type_ids": token_type_ids}
        return self.model(**{k: v.gather(1, columns) * mask for k, v in cut.items()}, attention_mask=mask, **kwargs)


def with_layers(model: Any, tokenizer: Any, data: Task, layers: int, method: Late, seed: int) -> Any:
    """The lowest layers of a BERT, trained like LATE: as long, at the same rate, with the same loss."""
    short = copy.deepcopy(model)
    short.bert.encoder.layer = short.bert.encoder.layer[:layers]
    short.config.num_hidden_layers = layers
    settings = Settings(
        method.epochs, method.lr, method.batch_size, method.max_length, 0.1, 0.01, seed, method.dropout, bf16_pays()
    )
    set_seed(seed)
    with tempfile.TemporaryDirectory() as folder:
        objective = distilled(copy.deepcopy(model), method.distill)
        fit(short, tokenizer, data, Path(folder), settings, objective=objective)
    return short


def measure(
    task: str, method: Late, name: str, seeds: list[int], rows: int | None, layers: list[int], path: Any
) -> None:
    model, tokenizer, data = real(task)
    if rows is not None:
        data = replace(data, train=data.train.shuffle(seed=0).select(range(rows)))
    tokens = median_tokens(data, tokenizer)
    splits = ("validation", "test")
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    record |= {"task": task, "metric": data.metric, "tokens": tokens, "train rows": len(data.train), **setting()}
    dense = {split: evaluate(model, tokenizer, data, split) for split in splits}
    record["dense"] = {split: found.metrics for split, found in dense.items()}
    done = {(row["method"], row["speedup"], row["seed"]) for row in record["rows"]}

    def add(label: str, speedup: float, seed: int, judged: Any, **more: Any) -> None:
        if (label, speedup, seed) in done:
            return
        row = {"method": label, "speedup": speedup, "seed": seed, **more}
        for split, before in dense.items():
            after = evaluate(judged, tokenizer, data, split)
            row[split] = after.metrics[data.metric]
            names = data.label_names or ()
            difference = paired_bootstrap(data.metric, before.logits, after.logits, before.labels, names=names)
            row[f"{split} difference"] = [round(value, 5) for value in difference]
        record["rows"].append(row)
        write(path, record)
        print(json.dumps(row), flush=True)

    for speedup in SPEEDUPS[1:]:
        if data.kind != "token_classification":  # a word that was cut away has no class
            add("dense, shortened texts", speedup, 0, Shortened(model, speedup))
    for seed in seeds:
        if all((name, speedup, seed) in done for speedup in SPEEDUPS):
            continue
        start = time.perf_counter()
        limits = constraints(Budget.parse("speedup>=1.5"), model, 1, tokens, units=False)
        outcome = method.run(Job(model, tokenizer, data, limits, Run(None, {}), 1, tokens, seed))
        seconds = round(time.perf_counter() - start, 1)
        trained, edit = outcome.model, outcome.edits[0]
        usual = dial_of(trained).selection
        untrained = copy.deepcopy(model)
        edit.apply(untrained)
        for speedup in SPEEDUPS:
            if speedup > dial_of(trained).reach:
                continue
            dial_of(trained).speedup = dial_of(untrained).speedup = speedup
            more = {"seconds": seconds, "profile": [round(m, 4) for m in edit.profile]}
            add(name, speedup, seed, trained, **more)
            if speedup not in COMPARED or seed != seeds[0]:
                continue
            for label, changes in variants(seed).items():
                dial_of(trained).selection = replace(usual, **changes)
                add(f"{name}, {label}", speedup, seed, trained)
            dial_of(trained).selection = usual
            add(f"{name}, before training", speedup, seed, untrained)
    for kept in layers:
        speedup = len(model.bert.encoder.layer) / kept
        if ("fewer layers", speedup, seeds[0]) not in done:
            add("fewer layers", speedup, seeds[0], with_layers(model, tokenizer, data, kept, method, seeds[0]))


def table(record: dict[str, Any], split: str) -> str:
    """Metric against speed-up."""
    return seeds_table(record, split, "speedup", list(SPEEDUPS), "{:g}×")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("sst2", "stsb", "wnut17", "long"), default="stsb")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--name", default="late", help="label of the rows, for ablations")
    parser.add_argument("--set", nargs="*", default=[], help="hyper-parameters, such as acc=entropy")
    parser.add_argument("--rows", type=int, help="train on so many rows, the same for every seed")
    parser.add_argument("--layers", nargs="*", type=int, default=[4, 3], help="layer dropping: how many stay")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / f"late_quality_{arguments.task}.json"
    if not arguments.table:
        settings = {}
        for pair in arguments.set:
            key, _, value = pair.partition("=")
            settings[key] = value if value.isalpha() and value not in ("true", "false") else json.loads(value)
        measure(
            arguments.task, Late(**settings), arguments.name, arguments.seeds, arguments.rows, arguments.layers, path
        )
    record = json.loads(path.read_text())
    for split in ("validation", "test"):
        print(table(record, split), end="\n\n")


if __name__ == "__main__":
    main()
