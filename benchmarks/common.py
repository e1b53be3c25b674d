"""What the benchmarks share: where real data and models are, and writing results."""

from __future__ import annotations

import json
import os
import statistics
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from long_texts import long_texts

from secateur import hub
from secateur.assets import demo_model
from secateur.costs.budget import Budget, constraints
from secateur.costs.machine import fingerprint
from secateur.hub import open_model, open_tokenizer
from secateur.results import versions
from secateur.run import Job, Method, Outcome, Run
from secateur.tasks import Evaluation, Task, evaluate, load_task, median_tokens, paired_bootstrap
from secateur.tasks.heads import head_class
from secateur.train import finetune

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("SECATEUR_SHARED", HERE.parent.parent / "shared")).resolve()
LONG = 384  # tokens that a long text is cut to in training; few are longer
os.environ.setdefault("SECATEUR_DATA", str(SHARED / "data"))


def real(task: str) -> tuple[Any, Any, Task]:
    """A MiniLM-L6 that is fine-tuned on a task, its tokenizer, and the task.

    Args:
        task: "sst2" or "stsb", of `shared/models/minilm-l6-<task>`; "wnut17" (entities), for which the demo's base
            model is fine-tuned first, once, in half an hour on one core; or "long" (`long_texts`), for which the one
            of SST-2 goes on learning, as long.
    """
    folder = HERE / "cache" / f"minilm-l6-{task}"
    if task == "wnut17":
        data = load_task(SHARED / "data" / task)
        if not folder.is_dir():
            finetune(demo_model(), None, data, folder, epochs=8, lr=1e-4, resume=True)
    elif task == "long":
        data = long_texts(SHARED)
        if not folder.is_dir():
            start = SHARED / "models" / "minilm-l6-sst2"
            finetune(start, None, data, folder, epochs=1, lr=1e-4, max_length=LONG, dropout=0.0, resume=True)
    else:
        data, folder = load_task(task), SHARED / "models" / f"minilm-l6-{task}"
    return open_model(folder, head_class(data)), open_tokenizer(folder), data


@dataclass
class Sweep:
    """Trained models of one task, judged against the dense one, row by row in a file that a later run goes on with.

    Attributes:
        model, tokenizer, data: of the task.
        tokens: of a median text.
        dense: what the dense model answers, by split.
        record: what the file holds.
        path: the file.
    """

    model: Any
    tokenizer: Any
    data: Task
    tokens: int
    dense: dict[str, Evaluation]
    record: dict[str, Any]
    path: Path

    @classmethod
    def of(cls, task: str, rows: int | None, path: Path) -> Sweep:
        """Open a task's model and data, and the file; train on so many rows of a fixed shuffle, if not on all."""
        model, tokenizer, data = real(task)
        if rows is not None:
            data = replace(data, train=data.split("train").shuffle(seed=0).select(range(rows)))
        record = json.loads(path.read_text()) if path.is_file() else {"rows": []}
        record |= {"task": task, "metric": data.metric, "train rows": len(data.train or ()), **setting()}
        dense = {split: evaluate(model, tokenizer, data, split) for split in ("validation", "test")}
        record["dense"] = {split: found.metrics for split, found in dense.items()}
        record["dense bytes"] = hub.bytes_on_disk(model)
        return cls(model, tokenizer, data, median_tokens(data, tokenizer), dense, record, path)

    def has(self, **key: Any) -> bool:
        """Whether the file has a row with these entries."""
        return any(all(row.get(name) == value for name, value in key.items()) for row in self.record["rows"])

    def run(self, method: Method, budget: str, seed: int, run: Run | None = None) -> tuple[Outcome, float]:
        """What a method makes of the model, and the seconds that it took; its stages are kept by a run."""
        limits = constraints(Budget.parse(budget), self.model, 1, self.tokens, units=False)
        start = time.perf_counter()
        outcome = method.run(
            Job(self.model, self.tokenizer, self.data, limits, run or Run(None, {}), 1, self.tokens, seed)
        )
        return outcome, round(time.perf_counter() - start, 1)

    def judge(self, model: Any, row: dict[str, Any]) -> dict[str, Evaluation]:
        """Add to a row a model's metric on each split, its difference to the dense one and the bytes of its file."""
        row["bytes"] = hub.bytes_on_disk(model)
        found = {}
        for split, before in self.dense.items():
            after = found[split] = evaluate(model, self.tokenizer, self.data, split)
            row[split] = after.metrics[self.data.metric]
            difference = paired_bootstrap(self.data.metric, before.logits, after.logits, before.labels)
            row[f"{split} difference"] = [round(value, 5) for value in difference]
        return found

    def keep(self, row: dict[str, Any]) -> None:
        """Write and show a row."""
        self.record["rows"].append(row)
        write(self.path, self.record)
        print(json.dumps(row), flush=True)


def pairs(given: list[str]) -> dict[str, Any]:
    """Hyper-parameters from "name=value"."""
    found = (pair.partition("=") for pair in given)
    return {key: value if value.isalpha() else json.loads(value) for key, _, value in found}


def seeds_table(record: dict[str, Any], split: str, column: str, values: list[Any], head: str) -> str:
    """The metric of every method at each value of a column: mean over seeds ± spread (largest minus smallest), in
    points; one seed has no spread. Rows of a method at one value have one setting: name others otherwise (`--suffix`).

    Args:
        record: a kept result.
        split: `"validation"` or `"test"`.
        column: the key of a row that the columns stand for.
        values: its values, in order.
        head: how a value is printed, such as `"{:g}×"`.
    """
    rows = record["rows"]
    lines = [
        f"{record['task']}, {record['metric']} on {split}; dense {100 * record['dense'][split][record['metric']]:.1f}",
        "",
        "| method | " + " | ".join(head.format(value) for value in values) + " |",
        "|---" * (len(values) + 1) + "|",
    ]
    for name in dict.fromkeys(row["method"] for row in rows):
        cells = []
        for value in values:
            those = [row for row in rows if row["method"] == name and row[column] == value]
            if any(row.get("set") != those[0].get("set") for row in those):
                raise ValueError(f"Rows of '{name}' at {value} differ in their settings: they have no mean.")
            found = [100 * row[split] for row in those]
            spread = f" ± {max(found) - min(found):.1f}" if len(found) > 1 else ""
            cells.append(f"{statistics.mean(found):.1f}{spread}" if found else "–")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def setting() -> dict[str, Any]:
    """What a reader needs to know about the machine."""
    return {"machine": fingerprint(), "versions": versions(), "threads": torch.get_num_threads()}


def write(path: Path, value: Any) -> None:
    """Write JSON, one row of a list per line so that changes read well."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = value.pop("rows")
    head = json.dumps(value, indent=1)[:-2]
    body = ",\n".join("  " + json.dumps(row) for row in rows)
    path.write_text(f'{head},\n "rows": [\n{body}\n ]\n}}\n')
    value["rows"] = rows
