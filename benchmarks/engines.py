"""Engines side by side on one machine, interleaved in one run: the native one, torch, ONNX Runtime, OpenVINO.

    python benchmarks/engines.py --models mini base --threads 1
    python benchmarks/engines.py --table      # print the table from the kept rows

Random weights, whole batches: speed only. With one thread a pass is timed by the process's own time, which other jobs
do not lengthen; with more by the clock. Medians and quartiles over rounds, every round in another order, each engine
once the threads of the one before are asleep. "sentences" are 32 texts whose lengths are drawn log-normally (median
25 tokens, 4 to 64): padded to the longest for engines that need it. "sliced" has half of all heads and neurons,
"dial" hands on evenly fewer tokens from layer to layer, down to a fifth; "a1" and "a8" have 1-bit weights and
activations of 1 or 8 bits; "a1 dial" is both; "masked" has 90 % of its weights at 0, "blocks" 80 % of its blocks of
32 outputs and 64 inputs; "padded" runs sentences as if all were as long as the longest. OpenVINO's int8 is NNCF's
post-training quantisation (`pip install nncf`), ONNX Runtime's is dynamic.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import HERE, setting, write
from transformers import BertConfig, BertForSequenceClassification

import secateur
from secateur import hub
from secateur.costs.timers import wait_for_sleep
from secateur.edits import DropTokens, Slice, apply_edits
from secateur.families import sites
from secateur.runtime import Precision, load
from secateur.runtime.build import TIERS, library
from secateur.sparsity.weights import prunable
from secateur.subnetwork import SubNetwork

MODELS = {
    "mini": dict(hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536),
    "base": dict(hidden_size=768, num_hidden_layers=12, num_attention_heads=12, intermediate_size=3072),
}
SHAPES = {"1x32": [32], "1x128": [128], "8x128": [128] * 8, "32x32": [32] * 32}
Runner = Callable[[], object]
AMX_OFF = "ONEDNN_MAX_CPU_ISA" in os.environ  # torch and OpenVINO do without it; ONNX Runtime has no such switch


def lengths_of(shape: str) -> list[int]:
    if shape != "sentences":
        return SHAPES[shape]
    drawn = np.random.default_rng(0).normal(np.log(25), 0.5, 32)
    return [int(n) for n in np.clip(np.round(np.exp(drawn)), 4, 64)]


def variants() -> dict[str, tuple[str, Precision | None, Callable[[Any], Any]]]:
    """The native engine's rows: tier, precision, and what becomes of the model."""
    best = library().sec_best_tier()
    found: dict[str, tuple[str, Precision | None, Callable[[Any], Any]]] = {}
    for tier in dict.fromkeys((TIERS[best], TIERS[min(best, TIERS.index("avx512"))])):
        if tier == TIERS[best]:
            found |= {f"{tier}.fp32": (tier, "fp32", dense), f"{tier}.bf16": (tier, "bf16", dense)}
        found[f"{tier}.int8"] = tier, "int8", dense
        if tier == TIERS[best]:
            found |= {f"{tier}.int8 sliced": (tier, "int8", sliced), f"{tier}.int8 dial": (tier, "int8", dialled)}
        found |= {
            f"{tier}.int8 masked": (tier, "int8", partial(sparse, share=0.9, block=(1, 1))),
            f"{tier}.int8 blocks": (tier, "int8", partial(sparse, share=0.8, block=(32, 64))),
        }
        found |= {
            f"{tier}.a1": (tier, None, partial(binary, bits=1)),
            f"{tier}.a8": (tier, None, partial(binary, bits=8)),
        }
        if tier == TIERS[best]:
            found[f"{tier}.a1 dial"] = tier, None, lambda model: dialled(binary(model, bits=1))
    return found


def dense(model: Any) -> Any:
    return model


def sliced(model: Any) -> Any:
    """Half of the heads and neurons of each layer."""
    twin = copy.deepcopy(model)
    found = sites(twin)
    heads, neurons = (
        [tuple(n < site.units // 2 for n in range(site.units)) for site in each]
        for each in (found.heads, found.neurons)
    )
    half = SubNetwork(tuple(heads), tuple(neurons))
    apply_edits(twin, [Slice(half)])
    return twin


def dialled(model: Any) -> Any:
    """Layers hand on fewer and fewer tokens, evenly from all to a fifth."""
    twin = copy.deepcopy(model)
    layers = twin.config.num_hidden_layers
    edit = DropTokens(tuple(1 - 0.8 * (n + 1) / layers for n in range(layers)), alpha=1.0)
    apply_edits(twin, [edit])
    hub.attach(twin, [edit])
    return twin


@torch.no_grad()
def sparse(model: Any, share: float, block: tuple[int, int]) -> Any:
    """So many of the blocks of the layers' maps at 0, by chance."""
    twin, source = copy.deepcopy(model), torch.Generator().manual_seed(0)
    for weight in prunable(twin).values():
        rows, columns = block
        kept = torch.rand(weight.shape[0] // rows, weight.shape[1] // columns, generator=source) >= share
        weight *= kept.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
    return twin


def binary(model: Any, bits: int) -> Any:
    """1-bit weights and activations of so many bits, uncalibrated by training: speed only."""
    source = torch.Generator().manual_seed(0)
    ids = torch.randint(1000, 30000, (2, 16), generator=source)
    return secateur.binarize(copy.deepcopy(model), [{"input_ids": ids}], bits)


class Rivals:
    """Engines of one model by name: each a function of padded inputs, or of ids that lie one behind the other."""

    def __init__(self, model: Any, threads: int, wanted: list[str], folder: Path) -> None:
        self.model, self.threads, self.folder = model, threads, folder
        self.half = BertForSequenceClassification(model.config).eval().bfloat16()
        self.own = {
            name: load(make(model), precision, tier=tier, threads=threads)
            for name, (tier, precision, make) in variants().items()
            if any(word in name for word in wanted)
        }
        self.others: dict[str, Callable[[dict[str, np.ndarray]], object]] = {}
        if "openvino" in wanted:
            self._openvino()
        if "onnxruntime" in wanted:
            self._onnxruntime()

    def _openvino(self) -> None:
        import nncf
        import openvino

        example = {name: torch.ones(2, 8, dtype=torch.long) for name in INPUTS}
        plain = openvino.convert_model(self.model, example_input=example)
        calibration = [padded([24 + i % 16] * 2) for i in range(32)]
        small = nncf.quantize(plain, nncf.Dataset(calibration), model_type=nncf.ModelType.TRANSFORMER)
        core = openvino.Core()
        for name, graph, precision in (
            ("openvino fp32", plain, "f32"),
            ("openvino bf16", plain, "bf16"),
            ("openvino int8", small, "f32" if AMX_OFF or library().sec_best_tier() < len(TIERS) - 1 else "bf16"),
        ):
            options = {
                "INFERENCE_PRECISION_HINT": precision,
                "PERFORMANCE_HINT": "LATENCY",
                "INFERENCE_NUM_THREADS": self.threads,
            }
            request = core.compile_model(graph, "CPU", options).create_infer_request()
            self.others[name] = lambda inputs, r=request: r.infer(inputs, share_inputs=True)  # type: ignore[misc]

    def _onnxruntime(self) -> None:
        import onnxruntime
        from onnxruntime.quantization import quantize_dynamic

        large, small = self.folder / "model.onnx", self.folder / "int8.onnx"
        example = tuple(torch.ones(2, 8, dtype=torch.long) for _ in INPUTS)
        axes = {name: {0: "batch", 1: "tokens"} for name in INPUTS}
        torch.onnx.export(self.model, example, str(large), input_names=list(INPUTS), dynamic_axes=axes, dynamo=False)
        quantize_dynamic(str(large), str(small))
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = self.threads
        for name, file in (("onnxruntime fp32", large), ("onnxruntime int8", small)):
            session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
            self.others[name] = lambda inputs, s=session: s.run(None, inputs)  # type: ignore[misc]

    def runners(self, lengths: list[int]) -> dict[str, Runner]:
        arrays = padded(lengths)
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items()}
        ids = tensors["input_ids"][tensors["attention_mask"].bool()]
        counts = torch.tensor(lengths)
        found: dict[str, Runner] = {
            "torch fp32": lambda: self.model(**tensors),
            "torch bf16": lambda: self.half(**tensors),
        }
        found |= {name: (lambda run=run: run(arrays)) for name, run in self.others.items()}  # type: ignore[misc]
        found |= {name: (lambda e=engine: e.encoded(ids, counts)) for name, engine in self.own.items()}  # type: ignore[misc]
        if len(ids) < arrays["input_ids"].size:
            full, longest = tensors["input_ids"].flatten() + 1, counts.new_full((len(counts),), max(lengths))
            whole = [name for name in self.own if name.endswith("int8")]
            found |= {f"{name} padded": (lambda e=self.own[name]: e.encoded(full, longest)) for name in whole}  # type: ignore[misc]
        return found


INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def padded(lengths: list[int]) -> dict[str, np.ndarray]:
    mask = np.arange(max(lengths))[None] < np.array(lengths)[:, None]
    ids = np.random.default_rng(1).integers(1000, 30000, mask.shape)
    return {
        "input_ids": np.where(mask, ids, 0),
        "attention_mask": mask.astype(np.int64),
        "token_type_ids": np.zeros_like(ids),
    }


def interleaved(runners: dict[str, Runner], threads: int, rounds: int, least: float) -> dict[str, list[float]]:
    """Milliseconds of a pass of each, round by round."""
    clock = time.process_time if threads == 1 else time.perf_counter
    for run in runners.values():
        run(), run()
    names, found = list(runners), {name: [] for name in runners}
    for number in range(rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            if threads > 1:
                wait_for_sleep()
                runners[name]()
            count, start = 0, clock()
            while clock() - start < least:
                runners[name]()
                count += 1
            found[name].append(1e3 * (clock() - start) / count)
    return found


def measure(arguments: argparse.Namespace, path: Path) -> None:
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    record |= setting()
    for name in arguments.models:
        torch.manual_seed(0)
        model = BertForSequenceClassification(BertConfig(num_labels=2, **MODELS[name])).eval()
        with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
            rivals = Rivals(model, arguments.threads, arguments.engines, Path(folder))
            for shape in arguments.shapes:
                lengths = lengths_of(shape)
                times = interleaved(rivals.runners(lengths), arguments.threads, arguments.rounds, arguments.seconds)
                milliseconds = {n: [round(q, 3) for q in statistics.quantiles(t, n=4)] for n, t in times.items()}
                row = {"model": name, "shape": shape, "threads": arguments.threads, "tokens": sum(lengths)}
                row |= {"without": "amx"} if AMX_OFF else {}
                same = [r for r in record["rows"] if identity(r) == identity(row)]
                rest = [r for r in record["rows"] if r not in same]
                record["rows"] = [*rest, {**row, "longest": max(lengths), "milliseconds": milliseconds}]
                write(path, record)
                print(name, shape, {n: q[1] for n, q in milliseconds.items()}, flush=True)


def identity(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row.get(key) for key in ("model", "shape", "threads", "without"))


def table(record: dict[str, Any]) -> str:
    """Median milliseconds of every engine; in brackets how many times as fast as torch in fp32."""
    names = list(dict.fromkeys(name for row in record["rows"] for name in row["milliseconds"]))
    lines = ["| model | batch x tokens | threads | " + " | ".join(names) + " |", "|---" * (3 + len(names)) + "|"]
    for row in record["rows"]:
        times = {name: quartiles[1] for name, quartiles in row["milliseconds"].items()}
        cells = [f"{times[n]:.1f} ({times['torch fp32'] / times[n]:.1f}×)" if n in times else "–" for n in names]
        model = f"{row['model']}, no AMX" if "without" in row else row["model"]
        lines.append(f"| {model} | {row['shape']} | {row['threads']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=MODELS, default=list(MODELS))
    parser.add_argument("--shapes", nargs="*", choices=[*SHAPES, "sentences"], default=[*SHAPES, "sentences"])
    parser.add_argument("--engines", nargs="*", default=["openvino", "onnxruntime", "fp32", "bf16", "int8", ".a"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=0.05, help="how long each is run in a round, at least")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true", help="only print the table")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(arguments.threads))
    path = HERE / "results" / "engines.json"
    if not arguments.table:
        measure(arguments, path)
    print(table(json.loads(path.read_text())))


if __name__ == "__main__":
    main()
