"""Metric against bits of activations: BiT and what it is made of, on the same model, data, epochs and seeds.

    python benchmarks/bit_quality.py --task stsb --bits 4 1 --set epochs=5
    python benchmarks/bit_quality.py --task stsb --table      # print the tables from the kept rows

Every row is one trained model with 1-bit weights: the metric on validation (by which the best epoch was chosen) and on
the labelled test split, its difference to the dense model with a paired bootstrap interval of 95 %, the bytes of the
file, and how many validation examples the same model on packed words answers with other logits.
"""

from __future__ import annotations

import argparse
import copy
import json
from contextlib import nullcontext
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import HERE, Sweep, pairs, seeds_table
from released_optimizer import released_optimizer

from secateur.binary import binarize
from secateur.bits.integer import packed_twin
from secateur.methods import Bit
from secateur.run import Run
from secateur.tasks import evaluate
from secateur.train import bf16_pays

BITS = (8, 4, 2, 1)
RELEASED = "released optimiser"
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
    "single step, calibrated by the mean": {"through": None, "calibration": "mean"},
    "single step, replaced words": {"through": None, "augment": 1},
    f"single step, {RELEASED}": {"through": None},
}


def measure(arguments: argparse.Namespace, common: dict[str, Any], path: Path) -> None:
    sweep = Sweep.of(arguments.task, arguments.rows, path)
    for seed, name, bits in product(arguments.seeds, arguments.methods, arguments.bits):
        row: dict[str, Any] = {"method": f"{name}{arguments.suffix}", "bits": bits, "seed": seed, "set": common}
        if sweep.has(**row):
            continue
        run, method = Stages(), Bit(**{**METHODS[name], **common})
        with released_optimizer() if name.endswith(RELEASED) else nullcontext():
            outcome, seconds = sweep.run(method, f"bits<={bits}", seed, run)
        row |= {"seconds": seconds, "gradients": "bfloat16" if bf16_pays() else "float32"}
        if len(run.found) > 1:
            keep_first_step(sweep, row, run, method)
        found = sweep.judge(outcome.model, row)
        if arguments.packed:
            words = evaluate(packed_twin(outcome.model), sweep.tokenizer, sweep.data, "validation").logits
            row["packed mismatches"] = int((words != found["validation"].logits).any(dim=-1).sum())
        if arguments.save is not None:
            outcome.model.save_pretrained(arguments.save / f"{row['method']}, {bits} bits, seed {seed}")
        sweep.keep(row)


class Stages(Run):
    """A run that remembers the tensors of its stages."""

    def __init__(self) -> None:
        super().__init__(None, {})
        self.found: dict[str, dict[str, torch.Tensor]] = {}

    def tensors(self, stage: str, *args: Any, **kwargs: Any) -> dict[str, torch.Tensor]:
        self.found[stage] = super().tensors(stage, *args, **kwargs)
        return self.found[stage]


def keep_first_step(sweep: Sweep, row: dict[str, Any], run: Stages, method: Bit) -> None:
    """A row of "single step" from the first of several steps, which is one."""
    stage, weights = next(iter(run.found.items()))
    bits = int(stage.split()[-2])
    first = row | {"method": "single step" + row["method"].partition("bits")[2], "bits": bits}
    key = {name: first[name] for name in ("method", "bits", "seed", "set")}
    if sweep.has(**key):
        return
    model = copy.deepcopy(sweep.model)
    binarize(model, [{"input_ids": torch.ones(1, 8, dtype=torch.long)}], bits, two_sets=method.two_sets)
    model.load_state_dict(weights)
    first["seconds"] = round(run.seconds[stage], 1)
    sweep.judge(model.eval(), first)
    sweep.keep(first)


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
    parser.add_argument("--save", type=Path, help="keep the models in this folder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / f"bit_quality_{arguments.task}.json"
    if not arguments.table:
        measure(arguments, pairs(arguments.set), path)
    record = json.loads(path.read_text())
    for split in ("validation", "test"):
        print(seeds_table(record, split, "bits", list(BITS), "{:g}"), end="\n\n")


if __name__ == "__main__":
    main()
