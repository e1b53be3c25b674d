"""What the benchmarks share: where real data and models are, and writing results."""

from __future__ import annotations

import json
import os
import statistics
from pathlib import Path
from typing import Any

import torch
from long_texts import long_texts

from secateur.assets import demo_model
from secateur.costs.machine import fingerprint
from secateur.hub import open_model, open_tokenizer
from secateur.results import versions
from secateur.tasks import Task, load_task
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


def seeds_table(record: dict[str, Any], split: str, column: str, values: list[Any], head: str) -> str:
    """The metric of every method at each value of a column: mean over seeds ± spread (largest minus smallest), in
    points; one seed has no spread.

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
            found = [100 * row[split] for row in rows if row["method"] == name and row[column] == value]
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
