"""The model card that travels with a compressed folder."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from secateur.report import numbers

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


_FRONT_CARD = """---
library_name: transformers
tags: [secateur, {method}]
base_model: {source}
---
# {source}, point {number} of a front by {method}

| | as given | here | ratio |
|---|---|---|---|
{rows}

{quality}

## Open it

```python
import secateur  # registers the folder format with transformers
from transformers import AutoModelFor{head}, AutoTokenizer

model = AutoModelFor{head}.from_pretrained("this folder")
```

## How it was made

| | |
|---|---|
| command | `{command}` |
| method | {settings} |
| seed | {seed} |
| versions | {versions} |
"""


def front_card(front: dict[str, Any], point: dict[str, Any]) -> str:
    """README.md of a model that was cut out of a super-network, from `front.json` and the point."""
    task, metric = front["task"], front["task"]["metric"]
    judged = front["judged"].get(str(point["number"]))
    quality = f"Error {point['error']:.4f} on the rows that the search judged by (1 - {metric})."
    if judged:
        change, low, high = judged["difference"]
        quality += (
            f" Task {_cell(task['name'])}, split {task['split']}, {task['examples']} examples: {metric} "
            f"{judged['metrics'][metric]:.4f}, {change:+.4f} ({low:+.4f} to {high:+.4f}) against the model as given."
        )
    rows = []
    for kind, cost in point["costs"].items():
        full = front["dense"]["costs"][kind]
        name = numbers.quantity_name(kind) if kind != "latency" else "Latency, predicted"
        rows.append(_row(name, full, cost, *numbers.unit_of(kind, [full])))
    return _FRONT_CARD.format(
        source=_cell(front["model"]),
        number=point["number"],
        rows="\n".join(rows),
        quality=quality,
        **_made(front),
    )


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
    task = result["task"]
    return _CARD.format(
        source=_cell(result["model"]),
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
        dial=_dial(result["edits"]),
        budget=_cell(result["budget"]["text"]),
        **_made(result),
    )


def _made(record: dict[str, Any]) -> dict[str, Any]:
    """What a card says of how its model was made, from the record of a result or a front."""
    method = record["method"]
    tokens = record["task"]["kind"] == "token_classification"
    return {
        "method": _cell(method["name"]),
        "head": "TokenClassification" if tokens else "SequenceClassification",
        "command": _cell(record["command"]),
        "settings": _cell(", ".join(f"{key} {value}" for key, value in method.items() if key != "name")),
        "seed": record["seed"],
        "versions": _cell(", ".join(f"{name} {number}" for name, number in record["versions"].items())),
    }


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
