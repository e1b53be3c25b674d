"""Measured speed-up of token elimination over the one that its MACs promise.

    python benchmarks/late_latency.py                # about a quarter of an hour on two cores

Dense and eliminating forms run in turns in one process: the dense model padded and packed, the same model with its dial
turned, padded and packed. Weights are those of MiniLM-L6 (SST-2) and random ones of BERT-base's shape; the profile is
linear down to 10 %. Lengths are equal within a batch, or those of real sentences.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable, Iterator
from typing import Any

import torch
from common import HERE, real, setting, write
from torch import Tensor
from transformers import BertConfig, BertForSequenceClassification

from secateur.costs.analytic import evaluation
from secateur.costs.inputs import dummy_inputs
from secateur.costs.timers import sample
from secateur.edits import DropTokens
from secateur.edits.tokens import Dial, dial_of
from secateur.tasks import batches
from secateur.tokens.scores import counts, shares

SPEEDUPS = (2.0, 3.0)
NOTHING_GOES = 1e-9  # the machinery of elimination, every token kept: the packed dense model


def cases(model: Any, texts: list[dict[str, Tensor]], shapes: list[tuple[int, int]]) -> Iterator[tuple[str, Any]]:
    """Named inputs: equal lengths, then real ones."""
    for batch, tokens in shapes:
        yield f"{batch} x {tokens}", dummy_inputs(model, batch, tokens)
    for inputs in texts:
        lengths = inputs["attention_mask"].sum(dim=1)
        yield f"{len(lengths)} sentences of {int(lengths.min())} to {int(lengths.max())} tokens", inputs


def theory(dial: Dial, alpha: float, lengths: list[int]) -> float:
    """MACs of the layers at full length over those at a setting, for texts of these lengths."""
    edit = dial.edit
    kept = counts(lengths, shares(edit.profile, alpha, edit.least, edit.steeper), edit.protected + edit.recent)
    dense = sum(dial.costs.macs(n, [n] * len(kept)) for n in lengths)
    return dense / sum(dial.costs.macs(n, [row[i] for row in kept]) for i, n in enumerate(lengths))


def rows(name: str, model: Any, inputs: Any, case: str, seconds: float) -> Iterator[dict[str, Any]]:
    dial = dial_of(model)
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    alphas = {k: dial.alpha_for(k, max(lengths)) for k in SPEEDUPS}

    def at(alpha: float, packed: bool) -> Callable[[], None]:
        def run() -> None:
            dial.alpha, dial.packed = alpha, packed
            model(**inputs)

        return run

    runners = {"dense padded": at(0.0, False), "dense packed": at(NOTHING_GOES, True)}
    for k, alpha in alphas.items():
        runners |= {f"{k:g} padded": at(alpha, False), f"{k:g} packed": at(alpha, True)}
    with evaluation(model), torch.inference_mode():
        times = sample(runners, seconds, 7)
    medians = {key: statistics.median(values) for key, values in times.items()}
    for key, values in times.items():
        wanted, form = key.split()
        expected = 1.0 if wanted == "dense" else theory(dial, alphas[float(wanted)], lengths)
        measured = medians[f"dense {form}"] / medians[key]
        ranked = sorted(values)
        yield {
            "model": name,
            "case": case,
            "tokens": sum(lengths),
            "form": form,
            "asked": wanted,
            "ms": round(medians[key], 2),
            "p10": round(ranked[len(ranked) // 10], 2),
            "p90": round(ranked[-(len(ranked) // 10) - 1], 2),
            "n": len(values),
            "theory": round(expected, 3),
            "measured": round(measured, 3),
            "of theory": round(measured / expected, 3),
            "over dense packed": round(medians["dense packed"] / medians[key], 3),
            "over dense padded": round(medians["dense padded"] / medians[key], 3),
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--only", choices=("minilm", "base"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    minilm, tokenizer, task = real("sst2")
    data = batches(task, "test", tokenizer, batch_size=32, shuffle=0, limit=32, buckets=False)
    texts = [{key: value for key, value in batch.items() if key != "labels"} for batch in data]
    torch.manual_seed(0)
    base = BertForSequenceClassification(BertConfig()).eval()
    dtype = "bf16" if arguments.bf16 else "fp32"
    path = HERE / "results" / f"late_latency_{dtype}.json"
    kept = json.loads(path.read_text())["rows"] if path.is_file() else []
    record: dict[str, Any] = {**setting(), "dtype": dtype, "rows": kept}
    for key, name, model, shapes in (
        ("minilm", "MiniLM-L6", minilm, [(1, 32), (1, 128), (8, 128), (32, 32), (8, 384)]),
        ("base", "BERT-base", base, [(1, 128), (8, 128), (4, 384)]),
    ):
        if arguments.only not in (None, key):
            continue
        record["rows"] = [row for row in record["rows"] if row["model"] != name]
        layers = model.config.num_hidden_layers
        DropTokens(tuple(1 - 0.9 * layer / layers for layer in range(1, layers + 1)), tokens=128).apply(model)
        dial_of(model).costs  # noqa: B018  (counted in fp32, before the cast)
        if arguments.bf16:
            model.to(torch.bfloat16)
        for case, inputs in cases(model, texts, shapes):
            for row in rows(name, model, inputs, case, arguments.seconds):
                record["rows"].append(row)
                print(json.dumps(row), flush=True)
            write(path, record)


if __name__ == "__main__":
    main()
