"""The demo: fine-tune MiniLM-L6 on film-review sentences, cut it by OPTIN, measure, report. Needs no model hub."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from secateur import api, assets
from secateur.errors import SecateurError
from secateur.report import write_report
from secateur.run import write_json
from secateur.tasks import load_task

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
    task = replace(load_task(assets.demo_data()), name="film reviews")
    dense = api.finetune(
        assets.demo_model(),
        None,
        task,
        out / "dense",
        epochs=1,
        lr=1e-4,
        batch_size=32,
        max_length=64,
        dropout=0.0,
        resume=True,
        progress=True,
    )
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
