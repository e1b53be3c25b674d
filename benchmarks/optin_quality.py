"""Metric against MACs: OPTIN, PTF and baselines on the same model, data and seeds.

    python benchmarks/optin_quality.py --task sst2            # about two hours on one core; rows are kept as they come
    python benchmarks/optin_quality.py --task sst2 --table    # print the tables from the kept rows

Every row is one sliced model: the metric on validation and on the labelled test split, the difference to the dense
model with a paired bootstrap interval of 95 %. Exact scores take one calibration batch of 32 (45 minutes on a busy
core), and refined ones are read off them. Scores are kept in `benchmarks/cache`: delete it after a change of the
scorers.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from common import HERE, real, seeds_table, setting, write
from safetensors.torch import load_file, save_file

from secateur.costs.budget import Budget, constraints
from secateur.methods import Baseline, Optin, Ptf
from secateur.methods.optin import unpack_scores
from secateur.run import Job, Run
from secateur.scores.trajectory import TrajectoryScores
from secateur.subnetwork import SubNetwork, UnitScores
from secateur.tasks import evaluate, median_tokens, paired_bootstrap

BUDGETS = (80, 70, 60, 50, 40)
PLAIN: dict[str, Any] = {"rearrange": False, "tune": "none"}
EXACT = "optin exact, one batch"


def cached(task: str, name: str, seed: int) -> Path:
    """Where the scores of a row are kept."""
    return HERE / "cache" / f"{task}-{name}-{seed}.safetensors".replace(" ", "-")


class Refined(Optin):
    """Refinement by the kept exact scores of the same batch: the numbers it would compute again."""

    def _exact(self, job: Job, data: Any, units: SubNetwork | None = None) -> TrajectoryScores:
        whole = unpack_scores(load_file(cached(job.task.name, EXACT, job.seed)))
        if units is None:
            return whole

        def near(scores: UnitScores) -> UnitScores:
            heads, neurons = units.masks()
            return UnitScores(
                [s.masked_fill(m == 0, torch.nan) for s, m in zip(scores.heads, heads, strict=True)],
                [s.masked_fill(m == 0, torch.nan) for s, m in zip(scores.neurons, neurons, strict=True)],
            )

        return replace(whole, trajectory=near(whole.trajectory), output=near(whole.output))


METHODS: dict[str, Callable[[], Any]] = {
    "random": lambda: Baseline("random"),
    "magnitude": lambda: Baseline("magnitude"),
    "local": lambda: Baseline("local"),
    "ptf search": lambda: Ptf(rearrange=False, tune="none"),
    "ptf + rearrange": lambda: Ptf(tune="none"),
    "ptf full (+ scale)": lambda: Ptf(),
    "ptf with our tuning": lambda: Ptf(tune="full"),
    "optin, trajectory only": lambda: Optin(lambda_c=0.0, **PLAIN),
    "optin, λ_c 0.1": lambda: Optin(lambda_c=0.1, **PLAIN),
    "optin, λ_c 1": lambda: Optin(lambda_c=1.0, **PLAIN),
    "optin, λ_c 10": lambda: Optin(lambda_c=10.0, **PLAIN),
    "optin, λ_c 1000": lambda: Optin(lambda_c=1000.0, **PLAIN),
    "optin, λ_c 10, one batch": lambda: Optin(**{**PLAIN, "batches": 1}),
    EXACT: lambda: Optin(scorer="exact", **{**PLAIN, "batches": 1}),
    "optin refined, one batch": lambda: Refined(refine=0.15, **{**PLAIN, "batches": 1}),
    "optin + rearrange": lambda: Optin(tune="none"),
    "optin + rearrange + scale": lambda: Optin(tune="scale"),
    "optin full": lambda: Optin(),
    "optin full, 16 batches × 3 probes": lambda: Optin(batches=16, probes=3),
    "optin full, λ_c 0": lambda: Optin(lambda_c=0.0),
    "optin full, λ_c 1000": lambda: Optin(lambda_c=1000.0),
}


class Shared(Run):
    """A run in memory whose scores are kept over budgets, and in a file, since they do not depend on the budget."""

    def __init__(self, path: Path) -> None:
        super().__init__(None, {})
        self.path = path

    def tensors(self, stage: str, compute: Callable[[], Any]) -> Any:
        if stage != "score":
            return super().tensors(stage, compute)
        if not self.path.is_file():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            save_file(super().tensors(stage, compute), self.path)
        return load_file(self.path)


def measure(task: str, methods: list[str], budgets: list[int], seeds: list[int], path: Any) -> None:
    model, tokenizer, data = real(task)
    tokens = median_tokens(data, tokenizer)
    dense = {split: evaluate(model, tokenizer, data, split) for split in ("validation", "test")}
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    record |= {"task": task, "metric": data.metric, "tokens": tokens, **setting()}
    record["dense"] = {split: found.metrics for split, found in dense.items()}
    done = {(row["method"], row["budget"], row["seed"]) for row in record["rows"]}
    for seed in seeds:
        for name in methods:
            shared = Shared(cached(task, name, seed))
            for budget in budgets:
                if (name, budget, seed) in done:
                    continue
                shared.seconds = {}
                start = time.perf_counter()
                limits = constraints(Budget.parse(f"macs<={budget}%"), model, 1, tokens)
                outcome = METHODS[name]().run(Job(model, tokenizer, data, limits, shared, 1, tokens, seed))
                row = {"method": name, "budget": budget, "seed": seed, "seconds": round(time.perf_counter() - start, 1)}
                for split, before in dense.items():
                    after = evaluate(outcome.model, tokenizer, data, split)
                    low_high = paired_bootstrap(data.metric, before.logits, after.logits, before.labels)
                    row[split] = after.metrics[data.metric]
                    row[f"{split} difference"] = [round(v, 5) for v in low_high]
                row["heads"] = sum(outcome.subnetwork.head_widths)
                row["neurons"] = sum(outcome.subnetwork.neuron_widths)
                record["rows"].append(row)
                write(path, record)
                print(json.dumps(row), flush=True)


def table(record: dict[str, Any], split: str) -> str:
    """Metric against MACs, the methods in the order of `METHODS`."""
    ranks = {name: rank for rank, name in enumerate(METHODS)}
    rows = sorted(record["rows"], key=lambda row: ranks[row["method"]])
    budgets = sorted({row["budget"] for row in rows}, reverse=True)
    return seeds_table({**record, "rows": rows}, split, "budget", budgets, "{} % MACs")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--task", choices=("sst2", "stsb"), default="sst2")
    parser.add_argument("--methods", nargs="*", default=list(METHODS))
    parser.add_argument("--budgets", nargs="*", type=int, default=list(BUDGETS))
    parser.add_argument("--seeds", nargs="*", type=int, default=[0, 1, 2])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / f"optin_quality_{arguments.task}.json"
    if not arguments.table:
        measure(arguments.task, arguments.methods, arguments.budgets, arguments.seeds, path)
    record = json.loads(path.read_text())
    for split in ("validation", "test"):
        print(table(record, split), end="\n\n")


if __name__ == "__main__":
    main()
