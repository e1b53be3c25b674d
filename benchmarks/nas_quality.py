"""Fronts of NAS: by strategy, by space, by sampler, and against methods that need no super-network.

    python benchmarks/nas_quality.py --task stsb --strategies one-shot standard --samplers random
    python benchmarks/nas_quality.py --task stsb --rivals ptf "layers dropped, fine-tuned" --set epochs=2 lr=1e-4
    python benchmarks/nas_quality.py --task stsb --table      # print the tables from the kept rows

Candidates are judged by validation rows, which the super-network was not trained on (SST-2: all 872; STS-B: 500 of a
fixed shuffle); the points of a front then by the labelled test split, each with a paired bootstrap interval of 95 %
against the dense model. Super-networks are kept in `benchmarks/cache`. Hypervolumes are those of the paper: each
objective by its quantile among all points of the file, reference (2, 2), so from 1 to 4; they change when rows are
added.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
from common import HERE, Sweep, pairs, write
from safetensors.torch import load_file, save_file

from secateur.costs.analytic import encoder_params, params
from secateur.families import sites
from secateur.methods import Nas, Optin, Ptf
from secateur.optimize.pareto import hypervolume, quantiles
from secateur.optimize.points import front_of
from secateur.optimize.spaces import Space
from secateur.prune import cut_out, taken
from secateur.run import Job, Run
from secateur.subnetwork import SubNetwork
from secateur.tasks import evaluate, paired_bootstrap
from secateur.train import Settings

ROWS = {"sst2": 872, "stsb": 500}
GRID = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
"""Shares of the encoder's parameters at which fronts are compared."""


RIVALS: dict[str, tuple[Callable[[], Any] | None, bool]] = {
    "optin": (Optin, False),
    "ptf": (Ptf, False),
    "ptf, fine-tuned": (Ptf, True),
    "layers dropped": (None, False),
    "layers dropped, fine-tuned": (None, True),
}
"""A method without training, or None for the first layers of the model; whether what is left is fine-tuned."""


class Kept(Run):
    """A run in memory whose super-network is kept in a file."""

    def __init__(self, path: Path) -> None:
        super().__init__(None, {})
        self.path = path
        self.trained = 0.0  # seconds that this run itself took for it

    def tensors(self, stage: str, compute: Callable[[], Any], *, part_of: str | None = None) -> Any:
        file = self.path.with_name(f"{self.path.name}-{stage}.safetensors")
        if not file.is_file():
            file.parent.mkdir(parents=True, exist_ok=True)
            start = time.perf_counter()
            made = super().tensors(stage, compute, part_of=part_of)
            self.trained += time.perf_counter() - start
            save_file({name: tensor.contiguous().clone() for name, tensor in made.items()}, file)
            file.with_suffix(".json").write_text(json.dumps(self.seconds[stage]))
        self.seconds[stage] = json.loads(file.with_suffix(".json").read_text())
        return load_file(file)


def measure(arguments: argparse.Namespace, common: dict[str, Any], path: Path) -> None:
    sweep = Sweep.of(arguments.task, arguments.rows, path)
    few = sweep.data.split("validation").shuffle(seed=0).select(range(ROWS[arguments.task]))
    data = replace(sweep.data, validation=few)
    full = {"params": params(sweep.model), "encoder_params": encoder_params(sweep.model)}
    dense = {name: cost.of(SubNetwork.full(sweep.model)) for name, cost in full.items()}
    grid = (arguments.seeds, arguments.strategies, arguments.spaces, arguments.order, arguments.samplers)
    for seed, strategy, space, order, sampler in product(*grid):
        settings = {"strategy": strategy, "space": space, "order": order, "sampler": sampler, **common}
        row: dict[str, Any] = {"seed": seed, "set": settings}
        if sweep.has(**row):
            continue
        method = Nas(holdout=0.0, **settings)
        name = f"nas-{arguments.task}-{strategy}-{space}-{order}-{seed}-" + "-".join(
            f"{k}{v}" for k, v in common.items() if k != "evaluations"
        )
        run = Kept(HERE / "cache" / name)
        job = Job(sweep.model, sweep.tokenizer, data, [], run, 1, sweep.tokens, seed)
        start = time.perf_counter()
        found = method.search(job, ("error", arguments.objective))
        spent = time.perf_counter() - start - run.trained
        row["seconds"] = {
            "train": round(sum(run.seconds.values()) - run.seconds["search"], 1),
            "search": round(spent, 1),
        }
        row["points"] = [
            [round(p.error, 5), *(round(p.costs[kind] / dense[kind], 5) for kind in full)] for p in found.points
        ]
        row["front"] = []
        for point in front_of(found.points, ("error", arguments.objective)):
            twin = taken(found.model, point, found.weights)
            after, before = evaluate(twin, sweep.tokenizer, sweep.data, "test"), sweep.dense["test"]
            difference = paired_bootstrap(sweep.data.metric, before.logits, after.logits, before.labels)
            layers = sum(map(any, zip(point.sub.head_widths, point.sub.neuron_widths, strict=True)))
            row["front"].append(
                {
                    "number": point.number,
                    "error": round(point.error, 5),
                    **{kind: round(point.costs[kind] / dense[kind], 5) for kind in full},
                    "test": round(after.metrics[sweep.data.metric], 5),
                    "difference": [round(value, 5) for value in difference],
                    "keeps": [layers, sum(point.sub.head_widths), sum(point.sub.neuron_widths)],
                }
            )
        sweep.keep(row)


def rivals(arguments: argparse.Namespace, common: dict[str, Any], path: Path) -> None:
    """Other ways to as many parameters, in the same file under "rivals"."""
    sweep = Sweep.of(arguments.task, arguments.rows, path)
    kept = sweep.record.setdefault("rivals", [])
    full = SubNetwork.full(sweep.model)
    dense = encoder_params(sweep.model).of(full)
    for seed, name, share in product(arguments.seeds, arguments.rivals, arguments.shares):
        key = {"method": name, "share": share, "seed": seed, "set": common}
        if any(all(row[k] == v for k, v in key.items()) for row in kept):
            continue
        make, tuned = RIVALS[name]
        start = time.perf_counter()
        if make is None:
            model = copy.deepcopy(sweep.model)
            layers = int(share * len(full.heads))
            cut_out(model, Space.of("layer", sites(model)).decode([int(i < layers) for i in range(len(full.heads))]))
        else:
            model = sweep.run(make(), f"encoder_params<={100 * share:g}%", seed)[0].model
        if tuned:
            job = Job(
                model, sweep.tokenizer, replace(sweep.data, validation=None), [], Run(None, {}), 1, sweep.tokens, seed
            )
            rest = {
                "batch_size": 32,
                "max_length": 128,
                "warmup": 0.0,
                "weight_decay": 0.01,
                "seed": seed,
                "bf16": False,
            }
            job.trained(model, Settings(**{**common, **rest}), [])
        row: dict[str, Any] = {**key, "seconds": round(time.perf_counter() - start, 1)}
        row["encoder_params"] = round(encoder_params(model).of(SubNetwork.full(model)) / dense, 5)
        sweep.judge(model.eval(), row)
        kept.append(row)
        write(path, sweep.record)
        print(json.dumps(row), flush=True)


def volumes(record: dict[str, Any]) -> list[float]:
    """The hypervolume of each row."""
    pool = [point for row in record["rows"] for point in row["points"]]
    errors, sizes = ([point[i] for point in pool] for i in (0, 2))
    found = []
    for row in record["rows"]:
        scaled = [quantiles([point[i] for point in row["points"]], pool) for i, pool in ((0, errors), (2, sizes))]
        found.append(hypervolume(list(zip(*scaled, strict=True)), (2.0, 2.0)))
    return found


def tables(record: dict[str, Any]) -> str:
    """Each setting: hypervolume, time, and the test metric of the best point at each share of encoder parameters."""
    metric, dense = record["metric"], record["dense"]["test"][record["metric"]]
    groups: dict[str, list[tuple[dict[str, Any], float]]] = {}
    for row, volume in zip(record["rows"], volumes(record), strict=True):
        groups.setdefault(json.dumps(row["set"], sort_keys=True), []).append((row, volume))
    head = [f"{share:.0%}".replace("%", " %") for share in GRID]
    lines = [
        f"{record['task']}, {metric} x 100 on test; dense {100 * dense:.1f}. Of each front the point that errs least",
        "on validation within a share of the encoder's parameters.",
        "",
        "| space | strategy | sampler | sorted | seeds | hypervolume | training + search | " + " | ".join(head) + " |",
        "|---" * (7 + len(GRID)) + "|",
    ]
    for rows in groups.values():
        given = rows[0][0]["set"]
        found = [volume for _, volume in rows]
        spread = f" ± {max(found) - min(found):.2f}" if len(found) > 1 else ""
        cells = []
        for share in GRID:
            best = [_best(row["front"], share) for row, _ in rows]
            cells.append("–" if None in best else f"{100 * statistics.mean(b['test'] for b in best if b):.1f}")
        minutes = (statistics.mean(row["seconds"][part] for row, _ in rows) / 60 for part in ("train", "search"))
        spent = " + ".join(f"{found:.0f}" for found in minutes)
        lines.append(
            f"| {given['space']} | {given['strategy']} | {given['sampler']} | {'yes' if given['order'] else 'no'} | "
            f"{len(rows)} | {statistics.mean(found):.2f}{spread} | {spent} min | " + " | ".join(cells) + " |"
        )
    return "\n".join(lines)


def both_tables(record: dict[str, Any]) -> list[str]:
    """The table of fronts, and that of rivals if there are some."""
    return [tables(record), *([rivals_table(record)] if record.get("rivals") else [])]


def rivals_table(record: dict[str, Any]) -> str:
    """The test metric of each rival at each share of encoder parameters."""
    rows = record.get("rivals", [])
    shares = sorted({row["share"] for row in rows}, reverse=True)
    lines = ["| method | " + " | ".join(f"{share:.0%}".replace("%", " %") for share in shares) + " |"]
    lines.append("|---" * (len(shares) + 1) + "|")
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for share in shares:
            found = [100 * row["test"] for row in rows if (row["method"], row["share"]) == (name, share)]
            cells.append(f"{statistics.mean(found):.1f}" if found else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _best(front: list[dict[str, Any]], share: float) -> dict[str, Any] | None:
    kept = [point for point in front if point["encoder_params"] <= share]
    return min(kept, key=lambda point: point["error"], default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sst2", "stsb"), default="stsb")
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--strategies", nargs="*", default=["one-shot"])
    parser.add_argument("--spaces", nargs="*", default=["small"])
    parser.add_argument("--samplers", nargs="*", default=["random"])
    parser.add_argument("--order", nargs="*", type=json.loads, default=[True])
    parser.add_argument("--objective", default="encoder_params")
    parser.add_argument("--rivals", nargs="*", choices=RIVALS, help="train no super-network, but these")
    parser.add_argument("--shares", nargs="*", type=float, default=[0.7, 0.5, 0.34])
    parser.add_argument("--set", nargs="*", default=[], help="hyper-parameters of all, such as epochs=2")
    parser.add_argument("--rows", type=int, help="train on so many rows, the same for every seed")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / f"nas_quality_{arguments.task}.json"
    if not arguments.table:
        (rivals if arguments.rivals else measure)(arguments, pairs(arguments.set), path)
    print("\n\n".join(both_tables(json.loads(path.read_text()))))


if __name__ == "__main__":
    main()
