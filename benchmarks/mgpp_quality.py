"""Metric against sparsity: MGPP and its rivals on the same model, data, epochs and seeds.

    python benchmarks/mgpp_quality.py --task stsb --methods prior magnitude --sparsities 80 90
    python benchmarks/mgpp_quality.py --task stsb --table      # print the tables from the kept rows

Every row is one trained model: the metric on validation and on the labelled test split, its difference to the dense
model with a paired bootstrap interval of 95 %, and the bytes of the file. SST-2 may train on a fixed subset (`--rows`).
"""

from __future__ import annotations

import argparse
import json
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import HERE, Sweep, pairs, seeds_table

from secateur.methods import Mgpp
from secateur.sparsity.weights import prunable

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
    sweep = Sweep.of(arguments.task, arguments.rows, path)
    weights = sum(weight.numel() for weight in prunable(sweep.model).values())
    for seed, name, percent in product(arguments.seeds, arguments.methods, arguments.sparsities):
        row: dict[str, Any] = {"method": f"{name}{arguments.suffix}", "sparsity": percent, "seed": seed, "set": common}
        method = Mgpp(**{**METHODS[name], **common})
        if sweep.has(**row) or (percent > 50 and method.pattern == "2:4"):
            continue
        outcome, seconds = sweep.run(method, f"sparsity>={percent}%", seed)
        reached = round(1 - (outcome.predicted or {})["map_params"] / weights, 6)
        row |= {"seconds": seconds, "reached": reached}
        sweep.judge(outcome.model, row)
        sweep.keep(row)


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
        measure(arguments, pairs(arguments.set), path)
    record = json.loads(path.read_text())
    for split in ("validation", "test"):
        print(seeds_table(record, split, "sparsity", list(SPARSITIES), "{:g} %"), end="\n\n")


if __name__ == "__main__":
    main()
