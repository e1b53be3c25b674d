"""Which score and which ACC to take by default: how far a dense model's output moves, on two tasks, without training.

    python benchmarks/late_scores.py        # about ten minutes on one core

Scores: one layer and all later ones hand on the same share of the tokens. ACC: the dial of each profile stands at the
same speed-ups. The change is the squared distance to the dense model's output over the variance of that, on 256
training examples (`search.tokens.relative_change`); for ACC they are other ones than those it was measured on.
"""

from __future__ import annotations

import argparse
import copy
import json
from dataclasses import replace
from typing import Any

import torch
from common import HERE, real, setting, write
from torch import Tensor

from secateur.edits.tokens import dial_of
from secateur.methods import Late
from secateur.methods.late import outputs
from secateur.optimize.tokens import relative_change
from secateur.run import Job, Run
from secateur.tasks import median_tokens

SCORES: dict[str, dict[str, Any]] = {
    "attention": {"weighting": "attention", "diagonal": True},
    "attention, without self": {"weighting": "attention", "diagonal": False},
    "value": {"weighting": "value", "diagonal": True},
    "value, without self": {"weighting": "value", "diagonal": False},
    "value, without self, smoothed (beta 0.5)": {"weighting": "value", "diagonal": False, "beta": 0.5},
}
SHARES = (0.75, 0.5, 0.25)
ACCS = ("effect", "mass", "participation", "entropy", "count")
SPEEDUPS = (1.5, 2.0, 3.0)


def examples(model: Any, tokenizer: Any, task: Any, seed: int) -> list[dict[str, Tensor]]:
    return Job(model, tokenizer, task, (), Run(None, {}), seed=seed).calibration(8, 32)


def rows(name: str) -> Any:
    model, tokenizer, task = real(name)
    tokens = median_tokens(task, tokenizer)
    learn, judge = (examples(model, tokenizer, task, seed) for seed in (0, 1))
    with torch.inference_mode():
        dense = outputs(model, judge)
        method = Late()
        for acc in ACCS:
            profile = replace(method, acc=acc).edit(model, learn, tokens)  # type: ignore[arg-type]
            twin = copy.deepcopy(model)
            profile.apply(twin)
            for speedup in SPEEDUPS:
                dial_of(twin).speedup = speedup
                yield {
                    "task": name,
                    "acc": acc,
                    "shares": [round(share, 3) for share in dial_of(twin).shares],
                    "speedup": speedup,
                    "change": round(relative_change(outputs(twin, judge), dense), 4),
                }
        dial = dial_of(twin)
        layers = len(dial.profile)
        usual = dial.selection
        for score, settings in SCORES.items():
            dial.selection = replace(usual, **settings)
            for layer in range(layers - 1):
                for share in SHARES:
                    with dial.handing_on((1.0,) * layer + (share,) * (layers - layer)):
                        change = relative_change(outputs(twin, judge), dense)
                    yield {"task": name, "score": score, "layer": layer + 1, "share": share, "change": round(change, 4)}


def tables(record: dict[str, Any]) -> str:
    """Both comparisons."""
    found = record["rows"]
    layers = sorted({row["layer"] for row in found if "layer" in row})
    lines = ["| task | score | " + " | ".join(f"layer {n}" for n in layers) + " |", "|---" * (len(layers) + 2) + "|"]
    for task in dict.fromkeys(row["task"] for row in found):
        for score in SCORES:
            cells = []
            for layer in layers:
                mine = [r for r in found if r["task"] == task and r.get("score") == score and r.get("layer") == layer]
                cells.append(" / ".join(f"{row['change']:.3f}" for row in mine))
            lines.append(f"| {task} | {score} | " + " | ".join(cells) + " |")
    lines += ["", "| task | ACC | " + " | ".join(f"{k:g}×" for k in SPEEDUPS) + " | shares at 1.5× |", "|---" * 6 + "|"]
    for task in dict.fromkeys(row["task"] for row in found):
        for acc in ACCS:
            mine = [row for row in found if row["task"] == task and row.get("acc") == acc]
            if mine:
                shown = ", ".join(f"{m:.2f}" for m in mine[0]["shares"])
                lines.append(f"| {task} | {acc} | " + " | ".join(f"{r['change']:.3f}" for r in mine) + f" | {shown} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / "late_scores.json"
    if not arguments.table:
        record: dict[str, Any] = {**setting(), "rows": []}
        for task in ("stsb", "sst2"):
            for row in rows(task):
                record["rows"].append(row)
                print(json.dumps(row), flush=True)
            write(path, record)
    print(tables(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
