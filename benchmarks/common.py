"""What the benchmarks share: where real data and models are, and writing results."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from secateur.costs.machine import fingerprint
from secateur.hub import open_model, open_tokenizer
from secateur.results import versions
from secateur.tasks import Task, load_task

HERE = Path(__file__).resolve().parent
SHARED = Path(os.environ.get("SECATEUR_SHARED", HERE.parent.parent / "shared")).resolve()
os.environ.setdefault("SECATEUR_DATA", str(SHARED / "data"))


def real(task: str) -> tuple[Any, Any, Task]:
    """Model, tokenizer and task of `shared/models/minilm-l6-<task>`."""
    folder = SHARED / "models" / f"minilm-l6-{task}"
    return open_model(folder), open_tokenizer(folder), load_task(task)


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
