"""Metric against bits of activations: BiT and what it is made of, on the same model, data, epochs and seeds.

    python benchmarks/bit_quality.py --task stsb --bits 4 1 --set epochs=5
    python benchmarks/bit_quality.py --task stsb --table      # print the tables from the kept rows

Every row is one trained model with 1-bit weights: the metric on validation (by which the best epoch was chosen) and on
the labelled test split, its difference to the dense model with a paired bootstrap interval of 95 %, the bytes of the
file, and how many validation examples the same model on packed words answers with other logits.
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
from secateur.bits.integer import packed_twin
from secateur.costs.budget import Budget, constraints
from secateur.methods import Bit
from secateur.run import Job, Run
from secateur.tasks import evaluate, median_tokens, paired_bootstrap

BITS = (8, 4, 2, 1)
METHODS: dict[str, dict[str, Any]] = {
    "single step": {"through": None},
    "through 2 bits": {"through": 2},
    "through 4 bits": {"through": 4},
    "through 4 and 2 bits": {"through": "4,2"},
    "single step, fixed scales": {"through": None, "elastic": False},
    "single step, signed everywhere": {"through": None, "two_sets": False},
    "single step, from labels": {"through": None, "distill": False},
    "single step, words in int8": {"through": None, "embeddings": "int8"},
    "single step, a scale for each row": {"through": None, "rows": True},
    "single step, calibrated by search": {"through": None, "calibration": "search"},
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
    done = {(row["method"], row["bits"], row["seed"]) for row in record["rows"]}
    for seed in arguments.seeds:
        for name in arguments.methods:
            for bits in arguments.bits:
                label = f"{name}{arguments.suffix}"
                if (label, bits, seed) in done:
                    continue
                limits = constraints(Budget.parse(f"bits<={bits}"), model, 1, tokens, units=False)
                start = time.perf_counter()
                method = Bit(**{**METHODS[name], **common})
                trained = method.run(Job(model, tokenizer, data, limits, Run(None, {}), 1, tokens, seed)).model
                row: dict[str, Any] = {"method": label, "bits": bits, "seed": seed, "set": common}
                row["seconds"] = round(time.perf_counter() - start, 1)
                row["bytes"] = hub.bytes_on_disk(trained)
                for split, before in dense.items():
                    after = evaluate(trained, tokenizer, data, split)
                    row[split] = after.metrics[data.metric]
                    difference = paired_bootstrap(data.metric, before.logits, after.logits, before.labels)
                    row[f"{split} difference"] = [round(value, 5) for value in difference]
                    if split == "validation" and arguments.packed:
                        words = evaluate(packed_twin(trained), tokenizer, data, split).logits
                        row["packed mismatches"] = int((words != after.logits).any(dim=-1).sum())
                record["rows"].append(row)
                write(path, record)
                print(json.dumps(row), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sst2", "stsb"), default="stsb")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--methods", nargs="*", choices=METHODS, default=["single step", "through 2 bits"])
    parser.add_argument("--bits", nargs="*", type=int, default=BITS)
    parser.add_argument("--set", nargs="*", default=[], help="hyper-parameters of all, such as epochs=2")
    parser.add_argument("--suffix", default="", help="added to the rows' names, for ablations")
    parser.add_argument("--rows", type=int, help="train on so many rows, the same for every seed")
    parser.add_argument("--packed", action="store_true", help="run validation on packed words too, and compare")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / f"bit_quality_{arguments.task}.json"
    if not arguments.table:
        pairs = (pair.partition("=") for pair in arguments.set)
        common = {key: value if value.isalpha() else json.loads(value) for key, _, value in pairs}
        measure(arguments, common, path)
    record = json.loads(path.read_text())
    for split in ("validation", "test"):
        print(seeds_table(record, split, "bits", list(BITS), "{:g}"), end="\n\n")


if __name__ == "__main__":
    main()
