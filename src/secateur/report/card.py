"""The model card that travels with a compressed folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_DIAL = """
The speed-up is a dial, without further training:

```python
model.secateur.speedup = 1.0           # the dense model
model.secateur.speedup = 2.5           # for texts of {tokens} tokens
model.secateur.latency_budget = "8ms"  # measured where it runs
```
"""

_CARD = """---
library_name: transformers
tags: [secateur, {method}]
base_model: {source}
---
# {source}, compressed by {method}

{headline}

| | before | after | ratio |
|---|---|---|---|
{rows}

MACs and latency: batch {batch}, {tokens} tokens, {dtype}, {threads} threads, on {cpu}.
{metric_line}

## Open it

```python
import secateur  # registers the folder format with transformers
from transformers import AutoModelFor{head}, AutoTokenizer

model = AutoModelFor{head}.from_pretrained("this folder")
```
{dial}
## How it was made

| | |
|---|---|
| command | `{command}` |
| method | {settings} |
| budget | {budget} |
| seed | {seed} |
| versions | {versions} |

`result.json` holds every number, `report.html` shows them.
"""


def card(result: dict[str, Any]) -> str:
    """README.md of a compressed model, from its `result.json`."""
    before, after, setting = result["before"], result["after"], result["latency_setting"]
    rows = [
        _row("MACs", before["macs"], after["macs"], 1e6, "M"),
        _row("parameters", before["params"], after["params"], 1e6, "M"),
        _row("encoder parameters", before["encoder_params"], after["encoder_params"], 1e6, "M"),
        _row(f"bytes, {setting['dtype']}", before["bytes"], after["bytes"], 1e6, "MB"),
        _row("latency, median", before["latency_ms"]["median"], after["latency_ms"]["median"], 1, "ms"),
    ]
    rows += [
        f"| {name} | {value:.4f} | {after['metrics'][name]:.4f} | {after['metrics'][name] - value:+.4f} |"
        for name, value in before["metrics"].items()
    ]
    method = result["method"]
    task = result["task"]
    return _CARD.format(
        source=_cell(result["model"]),
        method=_cell(method["name"]),
        headline=f"Budget `{_cell(result['budget']['text'])}`: {after['macs'] / before['macs']:.1%} of the MACs, "
        f"{after['params'] / before['params']:.1%} of the parameters, {after['bytes'] / before['bytes']:.1%} of the "
        f"bytes{_reached(result['budget'].get('terms') or ())}.",
        rows="\n".join(rows),
        batch=setting["batch"],
        tokens=setting["tokens"],
        dtype=setting["dtype"],
        threads=setting["threads"],
        cpu=_cell(result["machine"].get("cpu", "unknown processor")),
        metric_line=f"Metrics: task {_cell(task['name'])}, split {task['split']}, {task['examples']} examples.",
        head="TokenClassification" if task["kind"] == "token_classification" else "SequenceClassification",
        dial=_dial(result["edits"]),
        command=_cell(result["command"]),
        settings=_cell(", ".join(f"{key} {value}" for key, value in method.items() if key != "name")),
        budget=_cell(result["budget"]["text"]),
        seed=result["seed"],
        versions=_cell(", ".join(f"{name} {number}" for name, number in result["versions"].items())),
    )


def _reached(terms: Sequence[dict[str, Any]]) -> str:
    """What none of the rows shows: zeros, and bits of operands."""
    wording = {"sparsity": "; {:.1%} zeros in the layers' maps", "bits": "; {:g} bits of operands"}
    return "".join(wording[term["kind"]].format(term["reached"]) for term in terms if term["kind"] in wording)


def _dial(edits: list[dict[str, Any]]) -> str:
    tokens = [edit["tokens"] for edit in edits if edit["type"] == "drop_tokens"]
    return _DIAL.format(tokens=tokens[0]) if tokens else ""


def _row(name: str, before: float, after: float, unit: float, symbol: str) -> str:
    return f"| {name} | {before / unit:.2f} {symbol} | {after / unit:.2f} {symbol} | {after / before:.3f} |"


def _cell(text: object) -> str:
    """Text that cannot break out of a table cell or a code span."""
    return str(text).replace("|", "\\|").replace("`", "'").replace("\n", " ")
