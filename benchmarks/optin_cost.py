"""What it costs to score every head and neuron: one forward pass per unit, the exact scorer, the probe scorer.

    python benchmarks/optin_cost.py               # about half an hour on two cores

The naive algorithm and, for the larger model, the exact scorer are timed on a sample of the units and extrapolated.
MACs are counted by `torch.utils.flop_counter` over linear maps and matrix products, forward and backward.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from common import HERE, real, setting, write
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from torchmetrics.functional import spearman_corrcoef
from transformers import BertConfig, BertForSequenceClassification

from secateur.families import sites
from secateur.gates import gates
from secateur.scores.exact import exact_scores
from secateur.scores.probes import probe_scores
from secateur.scores.trajectory import combine, cosine_gram
from secateur.subnetwork import SubNetwork
from secateur.tasks import batches

LAMBDA = 10.0


def seconds_of(compute: Callable[[], Any]) -> tuple[Any, float]:
    start = time.perf_counter()
    return compute(), time.perf_counter() - start


def macs_of(compute: Callable[[], Any]) -> float:
    with FlopCounterMode(display=False) as counter:
        compute()
    return counter.get_total_flops() / 2


def some_units(model: nn.Module, share: float, seed: int = 0) -> SubNetwork:
    """A random share of the neurons, and fifty times that share of the heads, which are few."""
    generator = torch.Generator().manual_seed(seed)
    found = sites(model)
    return SubNetwork(
        tuple(tuple((torch.rand(s.units, generator=generator) < 50 * share).tolist()) for s in found.heads),
        tuple(tuple((torch.rand(s.units, generator=generator) < share).tolist()) for s in found.neurons),
    )


def naive(model: nn.Module, batch: dict[str, Tensor], units: int) -> None:
    """The published loop for a few neurons: mask, run the whole network, compare the Gram matrices of every layer."""
    found = sites(model)
    seen: list[Tensor] = []
    handles = [s.output.register_forward_hook(lambda m, a, o: seen.append(o)) for s in found.neurons]
    with torch.inference_mode():
        for unit in range(units):
            masks = [torch.ones(s.units) for s in found.neurons]
            masks[unit % len(masks)][unit] = 0
            for mask in (None, masks) if unit == 0 else (masks,):
                seen.clear()
                with gates(found, neurons=mask):
                    model(**batch)
                for features in seen:
                    cosine_gram(features.flatten(0, 1)[:768])
    for handle in handles:
        handle.remove()


def rank_correlation(exact: Any, probe: Any) -> dict[str, float | None]:
    """Spearman over the units that were scored exactly, None where those are fewer than ten."""
    found: dict[str, float | None] = {}
    for kind in ("heads", "neurons"):
        a, b = (torch.cat(getattr(combine(s, LAMBDA), kind)).double() for s in (exact, probe))
        # ρ of a sample differs from that of all units by a factor, which does not matter within a kind
        known = ~a.isnan()
        found[kind] = round(float(spearman_corrcoef(b[known], a[known])), 4) if int(known.sum()) >= 10 else None
    return found


def row(name: str, model: nn.Module, data: list[dict[str, Tensor]], share: float, probes: int) -> dict[str, Any]:
    total = sum(s.units for s in sites(model))
    sample = 12
    _, seconds = seconds_of(lambda: naive(model, data[0], sample))
    macs = macs_of(lambda: naive(model, data[0], 1)) / 2  # one unit and the intact network
    units = some_units(model, share)
    scored = sum(units.head_widths) + sum(units.neuron_widths)
    start = time.perf_counter()
    exact = exact_scores(model, data, units=units)
    exact_seconds = time.perf_counter() - start
    probe, probe_seconds = seconds_of(lambda: probe_scores(model, data, probes=probes))
    # batch by batch the work is the same but for its length: count the first
    probe_macs = macs_of(lambda: probe_scores(model, data[:1], probes=probes))
    per_unit = 1 / (sample + 1)
    return {
        "model": name,
        "units": total,
        "batches": len(data),
        "naive_seconds_per_batch": round(seconds * per_unit * total),
        "naive_macs_per_batch": macs * total,
        "exact_seconds": round(exact_seconds / scored * total),
        "exact_units_timed": scored,
        "probe_seconds": round(probe_seconds, 1),
        "probe_macs_per_batch": probe_macs,
        "macs_ratio": round(macs * total / probe_macs),
        "spearman": rank_correlation(exact, probe),
        "probes": probes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--share", type=float, default=0.1, help="share of MiniLM-L6's units that are scored exactly")
    parser.add_argument("--probes", type=int, default=8)
    parser.add_argument("--batches", type=int, default=4)
    parser.add_argument("--only", choices=("minilm", "base"), help="one of the two models")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer, task = real("sst2")
    data = batches(task, "train", tokenizer, batch_size=32, shuffle=0, limit=32 * arguments.batches)
    inputs = [{k: v for k, v in batch.items() if k != "labels"} for batch in data]
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig()).eval()
    for key, name, net, share in (
        ("minilm", "MiniLM-L6 (SST-2)", model, arguments.share),
        ("base", "BERT-base shape, random weights", base, arguments.share / 40),
    ):
        if arguments.only not in (None, key):
            continue
        record = {**setting(), "rows": [row(name, net, inputs, share, arguments.probes)]}
        write(HERE / "results" / f"optin_cost_{key}.json", record)
        print(json.dumps(record["rows"][-1], indent=1), flush=True)


if __name__ == "__main__":
    main()
