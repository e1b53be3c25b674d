"""Does a slice get as much faster as it gets smaller? Dense against 60 % and 40 % of the MACs, interleaved in one run.

    python benchmarks/slice_latency.py            # about five minutes

The number to look at is the time ratio divided by the MAC ratio: 1.00 means that every MAC that went saved its time.
Weights are random; widths are those that a search over equal scores gives, in multiples of 64.
"""

from __future__ import annotations

import argparse
import copy
import json
from typing import Any

import torch
from common import HERE, setting, write
from transformers import BertConfig, BertForSequenceClassification

from secateur.costs.analytic import macs
from secateur.costs.budget import Budget, constraints
from secateur.costs.latency import time_interleaved
from secateur.edits import Slice, apply_edits
from secateur.optimize.allocate import allocate
from secateur.scores.baselines import random_scores
from secateur.subnetwork import SubNetwork

SHAPES = {
    "BERT-base": BertConfig(),
    "MiniLM-L6": BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, num_labels=2
    ),
}
TOKENS = 128


def rows(name: str, config: BertConfig, dtype: torch.dtype, batch: int, seconds: float) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    dense = BertForSequenceClassification(config).to(dtype).eval()
    models = {"dense": dense}
    shares = {"dense": 1.0}
    cost = macs(dense, batch, TOKENS)
    for budget in (60, 40):
        limits = constraints(Budget.parse(f"macs<={budget}%"), dense, batch, TOKENS)
        sub = allocate(random_scores(dense, 0), limits)
        models[f"{budget} %"] = apply_edits(copy.deepcopy(dense), [Slice(sub)])
        shares[f"{budget} %"] = cost.of(sub) / cost.of(SubNetwork.full(dense))
    timings = time_interleaved(models, batch, TOKENS, seconds=seconds, min_runs=10)
    return [
        {
            "shape": name,
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "model": label,
            "macs_share": round(shares[label], 4),
            "median_ms": round(timing.median, 2),
            "p90_ms": round(timing.p90, 2),
            "n": timing.n,
            "time_share": round(timing.median / timings["dense"].median, 4),
            "time_over_macs": round(timing.median / timings["dense"].median / shares[label], 3),
        }
        for label, timing in timings.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="per shape, dtype and batch")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, config in SHAPES.items():
            for batch in (1, 8):
                found += rows(name, config, dtype, batch, arguments.seconds)
                print(json.dumps(found[-2:]), flush=True)
                write(HERE / "results" / "slice_latency.json", {**setting(), "tokens": TOKENS, "rows": found})


if __name__ == "__main__":
    main()
