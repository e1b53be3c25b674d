"""Metric against sparsity: MGPP and its rivals on the same model, data, epochs and seeds.

    python benchmarks/mgpp_quality.py --task stsb --methods prior magnitude --sparsities 80 90
    python benchmarks/mgpp_quality.py --task stsb --table      # print the tables from the kept rows

Every row is one trained model: the metric on validation and on the labelled test split, its difference to the dense
model with a paired bootstrap interval of 95 %, and the bytes of the file. SST-2 may train on a fixed subset (`--rows`).
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import HERE, real, seeds_table, setting, write

from secateur import hub
from secateur.costs.budget import Budget, constraints
from secateur.methods import Mgpp
from secateur.run import Job, Run
from secateur.sparsity.weights import prunable
from secateur.tasks import evaluate, median_tokens, paired_bootstrap

SPARSITIES = (50, 70, 80, 90, 95)
METHODS: dict[str, dict[str, Any]] = {
    "prior": {},
    "prior, strength annealed": {"anneal": "strength", "slab_share": 1e-7},
    "prior, constant": {"anneal": "none", "slab_share": 1e-3},
    "slab alone": {"anneal": "none", "spike": 0.1},  # plain L2 of the same strength
    "prior, platon's ranking": {"score": "platon"},
    "slab alone, platon's ranking": {"score": "platon", "anneal": "none", "spike": 0.1},
    "magnitude": {"prior": False},
    "platon": {"prior": False, "score": "platon"},
    "movement": {"prior": False, "score": "movement"},
    "prior, blocks of 32 x 32": {"pattern": "32x32"},
    "prior, blocks of 16 x 4": {"pattern": "16x4"},
    "prior, 2:4": {"pattern": "2:4"},
    "prior, heads and neurons": {"pattern": "units"},
    "magnitude, heads and neurons": {"prior": False, "pattern": "units"},
}


def measure(arguments: argparse.Namespace, common: dict[str, Any], path: Path) -> None:
    model, tokenizer, data = real(arguments.task)
    if arguments.rows is not None:
        data = replace(data, train=data.train.shuffle(seed=0).select(range(arguments.rows)))  # type: ignore[union-attr]
    tokens = median_tokens(data, tokenizer)
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    record |= {"task": arguments.task, "metric": data.metric, "train rows": len(data.train or ()), **setting()}
    dense = {split: evaluate(model, tokenizer, data, split) for split in ("validation", "test")}
    record["dense"] = {split: found.metrics for split, found in dense.items()}
    record["dense bytes"] = hub.bytes_on_disk(model)
    for seed in arguments.seeds:
        for name in arguments.methods:
            for percent in arguments.sparsities:
                label = f"{name}{arguments.suffix}"
                if any((r["method"], r["sparsity"], r["seed"]) == (label, percent, seed) for r in record["rows"]):
                    continue
                method = Mgpp(**{**METHODS[name], **common})
                if percent / 100 > 0.5 and method.pattern == "2:4":
                    continue
                limits = constraints(Budget.parse(f"sparsity>={percent}%"), model, 1, tokens, units=False)
                start = time.perf_counter()
                outcome = method.run(Job(model, tokenizer, data, limits, Run(None, {}), 1, tokens, seed))
                row: dict[str, Any] = {"method": label, "sparsity": percent, "seed": seed, "set": common}
                row["seconds"] = round(time.perf_counter() - start, 1)
                there = (outcome.predicted or {})["map_params"]
                row["reached"] = round(1 - there / sum(weight.numel() for weight in prunable(model).values()), 6)
                row["bytes"] = hub.bytes_on_disk(outcome.model)
                for split, before in dense.items():
                    after = evaluate(outcome.model, tokenizer, data, split)
                    row[split] = after.metrics[data.metric]
                    difference = paired_bootstrap(data.metric, before.logits, after.logits, before.labels)
                    row[f"{split} difference"] = [round(value, 5) for value in difference]
                record["rows"].append(row)
                write(path, record)
                print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sst2", "stsb"), default="stsb")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["prior", "magnitude", "platon", "movement"])
    parser.add_argument("--sparsities", nargs="*", type=int, default=SPARSITIES)
    parser.add_argument("--set", nargs="*", default=[], help="hyper-parameters of all, such as epochs=2")
    parser.add_argument("--suffix", default="", help="added to the rows' names, for ablations")
    parser.add_argument("--rows", type=int, help="train on so many rows, the same for every seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / f"mgpp_quality_{arguments.task}.json"
    if not arguments.table:
        pairs = (pair.partition("=") for pair in arguments.set)
        common = {key: value if value.isalpha() else json.loads(value) for key, _, value in pairs}
        measure(arguments, common, path)
    record = json.loads(path.read_text())
    for split in ("validation", "test"):
        print(seeds_table(record, split, "sparsity", list(SPARSITIES), "{:g} %"), end="\n\n")


if __name__ == "__main__":
    main()
