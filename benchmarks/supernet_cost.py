"""What a step of a super-network costs with views of the weights, against gates on whole blocks.

    python benchmarks/supernet_cost.py

MiniLM-L6, 32 rows of STS-B, "one-shot" on SMALL: the full network, the smallest, two random ones, forward and backward,
in turns; and one evaluation pass of a sub-network of half the layers' width.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
from collections.abc import Callable
from contextlib import nullcontext
from unittest.mock import patch

import torch
from common import HERE, real, setting, write

from secateur import gates
from secateur.costs.timers import sample
from secateur.families import sites
from secateur.optimize.spaces import Space
from secateur.tasks import batches
from secateur.train.supernet import SuperNetwork


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer, data = real("stsb")
    batch = next(iter(batches(data, "train", tokenizer, shuffle=0, limit=32)))
    found = sites(model)
    space = Space.of("small", found, 64)
    network = SuperNetwork(space, "one-shot", draw=lambda source: space.decode(space.sample(source)))
    half = space.decode((len(found.heads), found.heads[0].units // 2, space.highest[2] // 2))

    def step(way: str) -> Callable[[], object]:
        source = random.Random(0)  # both ways draw the same sub-networks

        def run() -> object:
            network.passes = network.at(source.randrange(10_000), 10_000)
            with _ways(way):
                network.objective(model, batch).backward()
            return model.zero_grad()

        return run

    def judge(way: str) -> Callable[[], object]:
        def run() -> object:
            with torch.inference_mode(), _ways(way), gates.only(found, half):
                return model(**batch)

        return run

    rows = []
    for name, make in (("step", step), ("evaluation, half width", judge)):
        times = sample({way: make(way) for way in ("gates", "views")}, arguments.seconds / 2, 5)
        ratios = sorted(v / g for g, v in zip(times["gates"], times["views"], strict=True))
        rows.append(
            {
                "what": name,
                **{way: round(statistics.median(found), 1) for way, found in times.items()},
                "ratio": round(statistics.median(ratios), 3),
                "quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
                "n": len(ratios),
            }
        )
        print(json.dumps(rows[-1]))
    write(HERE / "results" / "supernet_cost.json", {**setting(), "rows": rows})


def _ways(way: str):  # type: ignore[no-untyped-def]
    return patch.object(gates, "_can_narrow", lambda *_: False) if way == "gates" else nullcontext()


if __name__ == "__main__":
    main()
