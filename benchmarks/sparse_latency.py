"""What zeros gain in milliseconds: a sparse model with kernels chosen here, beside its dense self, in turns.

    python benchmarks/sparse_latency.py              # prints ratios and keeps them in results/sparse_latency.json

Models have the shapes of MiniLM-L6 and BERT-base with random weights: time does not depend on their values. The lowest
weights (or blocks) of all maps together are zero, as after magnitude pruning; attention's maps are drawn
narrower than the others, so that sparsity differs between maps as it does in trained models.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

import torch
from common import HERE, setting, write
from transformers import AutoConfig, AutoModelForSequenceClassification

import secateur
from secateur.runtime.choice import time_kernels
from secateur.sparsity.selection import Blocks, choose
from secateur.sparsity.weights import prunable

SHAPES: dict[str, dict[str, int]] = {
    "MiniLM-L6": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "BERT-base": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
BLOCKS = {"weights": Blocks(), "16 x 4": Blocks(16, 4), "32 x 32": Blocks(32, 32)}
CASES = ((1, 32), (1, 128), (8, 32), (8, 128))


def sparse(shape: str, blocks: Blocks, share: float) -> Any:
    """A model of a shape with so large a share of its maps' weights at zero."""
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("bert", **SHAPES[shape])).eval()
    weights = prunable(model)
    for name, weight in weights.items():
        units = blocks.units(torch.rand_like(weight))
        scale = torch.rand_like(units) * (0.8 if "attention" in name else 1.0)
        weight.data.mul_(blocks.kept(weight, scale))
    masks = choose([weight.detach().abs() for weight in weights.values()], share, blocks, 0.01)
    for weight, mask in zip(weights.values(), masks, strict=True):
        weight.data.mul_(mask)
    return secateur.sparsify(model, block=(blocks.rows, blocks.columns))


def kernel_at(kernels: dict[int, str], rows: int) -> str:
    """What is taken for a number of rows."""
    return next((name for most, name in kernels.items() if rows <= most), "dense")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--zeros", nargs="*", choices=BLOCKS, default=list(BLOCKS))
    parser.add_argument("--sparsities", nargs="*", type=int, default=[80, 90, 95])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--seconds", type=float, default=4.0, help="for each case")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / "sparse_latency.json"
    rows = json.loads(path.read_text())["rows"] if path.is_file() else []
    for shape in arguments.shapes:
        for name in arguments.zeros:
            blocks = BLOCKS[name]
            for percent in arguments.sparsities:
                model = sparse(shape, blocks, percent / 100)
                taken = secateur.choose_kernels(model)
                for batch, tokens in CASES:
                    timings = time_kernels(model, batch, tokens, seconds=arguments.seconds)
                    found = dict(zip(("dense", "sparse"), timings, strict=True))
                    row = {"shape": shape, "zeros": name, "sparsity": percent, "batch": batch, "tokens": tokens}
                    row |= {"threads": arguments.threads}
                    row |= {f"{kind} ms": round(timing.median, 2) for kind, timing in found.items()}
                    row["ratio"] = round(found["sparse"].median / found["dense"].median, 3)
                    row["not dense"] = sum(  # maps that take a kernel at so many rows
                        len(one.maps) for one in taken if kernel_at(one.kernels, batch * tokens) != "dense"
                    )
                    row["p90 ratio"] = round(found["sparse"].p90 / found["dense"].p90, 3)
                    rows = [r for r in rows if any(r[key] != row[key] for key in list(row)[:6])] + [row]
                    print(json.dumps(row), flush=True)
                write(path, {**setting(), "rows": rows})
                for one in taken:
                    print(f"  {len(one.maps)} x {one.shape} {one.sparsity:.2f} {one.kernels}", flush=True)


if __name__ == "__main__":
    main()
