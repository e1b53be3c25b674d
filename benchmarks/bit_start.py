"""How fast 1-bit models begin to learn: distance to the teacher in the last steps of a short training.

    python benchmarks/bit_start.py --set lr=5e-4                      # the defaults of `Bit` but for the rate
    python benchmarks/bit_start.py --set lr=5e-4 calibration=mean
    python benchmarks/bit_start.py --set lr=5e-4 --released           # with the released code's optimiser

Two hundred steps of 16 rows of a fixed shuffle, without dropout, the rate rising over a tenth of them and falling to
zero; the loss is BiT's, without labels. Validation is its first 400 rows, which nothing was chosen by.
"""

from __future__ import annotations

import argparse
import json
import statistics
from contextlib import nullcontext
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from common import HERE, pairs, real, setting, write
from released_optimizer import released_optimizer

from secateur.costs.budget import Budget, constraints
from secateur.methods import Bit, bit
from secateur.run import Job, Run
from secateur.tasks import evaluate
from secateur.train import imitated

LAST = 40  # steps


def losses_of(method: Bit, job: Job) -> tuple[Any, list[float]]:
    """A trained model, and the loss of each step."""
    seen: list[float] = []

    def watched(teacher: Any) -> Any:
        objective = imitated(teacher)

        def loss(model: Any, batch: Any) -> Any:
            found = objective(model, batch)
            seen.append(float(found.detach()))
            return found

        return loss

    with patch.object(bit, "imitated", watched):
        return method.run(job).model, seen


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=("sst2", "stsb"), default="stsb")
    parser.add_argument("--bits", type=int, default=1)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--set", nargs="*", default=[], help="hyper-parameters, such as lr=5e-4")
    parser.add_argument("--released", action="store_true", help="take the released code's optimiser")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / "bit_start.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    model, tokenizer, data = real(arguments.task)
    common = pairs(arguments.set)
    method = Bit(**{"through": None, "epochs": 1, "dropout": 0.0, **common})
    few = data.split("train").shuffle(seed=0).select(range(arguments.steps * method.batch_size))
    limits = constraints(Budget.parse(f"bits<={arguments.bits}"), model, 1, 32, units=False)
    job = Job(model, tokenizer, replace(data, train=few, validation=None), limits, Run(None, {}), 1, 32, 0)
    with released_optimizer() if arguments.released else nullcontext():
        trained, losses = losses_of(method, job)
    judged = replace(data, validation=data.split("validation").select(range(400)))
    row = {"task": arguments.task, "bits": arguments.bits, "steps": arguments.steps, "set": common}
    row |= {"released optimiser": arguments.released, "loss": round(statistics.mean(losses[-LAST:]), 3)}
    row[data.metric] = round(evaluate(trained, tokenizer, judged, "validation").metrics[data.metric], 3)
    print(json.dumps(row))
    write(path, {**setting(), "rows": [*rows, row]})


if __name__ == "__main__":
    main()
