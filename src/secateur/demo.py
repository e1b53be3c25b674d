"""The demo: fine-tune MiniLM-L6 on film-review sentences, cut it by OPTIN, measure, report. Needs no model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur import api, assets
from secateur.errors import SecateurError
from secateur.report import write_report
from secateur.run import read_json, write_json
from secateur.tasks import Task, fingerprint, load_task

FINETUNE = {"epochs": 3, "lr": 1e-4, "batch_size": 32, "max_length": 64, "seed": 0}
BUDGET = "macs<=60%"
BATCH, TOKENS = 8, 128


def run_demo(out: Path) -> dict[str, Any]:
    """Run the demo.

    Args:
        out: folder to write: `dense/`, `compressed/`, `result.json`, `report.html`. A fine-tuned model that is already
            there is used again; a fine-tuning that was killed goes on.

    Returns:
        The content of `result.json`.

    Raises:
        SecateurError: the assets cannot be had, or `out` is a file.
    """
    if out.exists() and not out.is_dir():
        raise SecateurError(f"'{out}' is a file: name a folder with --out.")
    out.mkdir(parents=True, exist_ok=True)
    task = load_task(assets.demo_data())
    dense = _dense(out, task)
    result = api.compress(
        dense, task=task, budget=BUDGET, out=out / "compressed", split="test", batch=BATCH, tokens=TOKENS, progress=True
    )
    again = api.evaluate(out / "compressed", task, split="test")
    if again.metrics != result.after.metrics:
        raise SecateurError("The reopened model scores differently: please report this.")
    record = result.to_dict()
    write_json(out / "result.json", record)
    write_report([record], out / "report.html")
    return record


def _dense(out: Path, task: Task) -> Path:
    """The fine-tuned model, trained only if the one that is there came from other data or settings."""
    folder, marker = out / "dense", out / "dense" / "finetune.json"
    wanted = {"settings": FINETUNE, "data": fingerprint(task)}
    if marker.is_file() and read_json(marker) == wanted:
        return folder
    api.finetune(assets.demo_model(), None, task, folder, **FINETUNE, resume=True, progress=True)  # type: ignore[arg-type]
    write_json(marker, wanted)
    return folder
