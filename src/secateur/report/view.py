"""From `result.json` to what the report shows: numbers formatted, names short, nothing left for the template."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import PurePath
from typing import Any

from secateur.errors import SecateurError
from secateur.report import numbers
from secateur.report.numbers import Sense
from secateur.subnetwork import SubNetwork
from secateur.tokens.scores import counts, shares

Record = Mapping[str, Any]

SCHEMA = 1
_NEEDED = ("name", "model", "task", "method", "budget", "before", "after")
_SIZE = numbers.quantity_name("bytes")
_COSTS = ("macs", "params", "encoder_params", "bytes")


@dataclass(frozen=True)
class Row:
    """One quantity before and after."""

    name: str
    before: str
    after: str
    change: str
    sense: Sense


@dataclass(frozen=True)
class Term:
    """One term of the budget."""

    name: str
    asked: str
    limit: str
    reached: str
    used: str
    met: bool


@dataclass(frozen=True)
class Forecast:
    """A predicted quantity beside the measured one."""

    name: str
    predicted: str
    measured: str
    error: str


@dataclass(frozen=True)
class Stage:
    """A stage of the run; `share` of the whole time in per cent."""

    name: str
    seconds: str
    share: float


@dataclass(frozen=True)
class Layer:
    """A block's label and how many of its units are kept."""

    label: str
    kept: int
    units: int


@dataclass(frozen=True)
class View:
    """One result, ready to print; `index` is its place among the results shown."""

    index: int
    record: Record = field(repr=False)
    name: str
    model: str
    method: str
    metric: str
    headline: str
    summary: str
    tiles: tuple[Row, ...]
    rows: tuple[Row, ...]
    terms: tuple[Term, ...]
    forecasts: tuple[Forecast, ...]
    stages: tuple[Stage, ...]
    total: str
    setting: str
    heads: tuple[Layer, ...]
    neurons: tuple[Layer, ...]
    tokens: tuple[Layer, ...]
    subnetwork: SubNetwork | None
    facts: tuple[tuple[str, str], ...]
    command: str


def views(records: Sequence[Record]) -> tuple[View, ...]:
    """Check and prepare results.

    Raises:
        SecateurError: there are none, or one is not the content of a `result.json` this version reads.
    """
    if not records:
        raise SecateurError("There is no result to report: name at least one folder with a result.json.")
    return tuple(_checked_view(index, record) for index, record in enumerate(records))


def _checked_view(index: int, record: Record) -> View:
    missing = [key for key in _NEEDED if not isinstance(record, Mapping) or key not in record]
    if missing:
        raise SecateurError(f"This is no result.json of secateur: it lacks {', '.join(missing)}.")
    if record.get("schema", SCHEMA) != SCHEMA:
        raise SecateurError(
            f"result.json has schema {record['schema']!r}, this version reads {SCHEMA}: upgrade secateur."
        )
    try:
        return _view(index, record)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SecateurError(
            f"The result.json of '{record['name']}' is damaged ({type(error).__name__}: {error})."
        ) from error


def _view(index: int, record: Record) -> View:
    before, after, metric = record["before"], record["after"], str(record["task"].get("metric", ""))
    rows = tuple(_cost_row(kind, before, after) for kind in _COSTS if kind in after)
    dtype = (record.get("latency_setting") or {}).get("dtype")
    if dtype:  # models are opened in float32, whatever the source is stored in
        rows = tuple(replace(row, name=f"{row.name}, {dtype}") if row.name == _SIZE else row for row in rows)
    latency = _latency_rows(before, after)
    metrics = _metric_rows(before, after)
    tokens = _tokens(record.get("edits") or [])
    subnetwork = SubNetwork.from_dict(record["subnetwork"]) if record.get("subnetwork") else None
    if tokens and subnetwork is not None and all(all(m) for m in (*subnetwork.heads, *subnetwork.neurons)):
        subnetwork = None  # every unit stayed: nothing to show
    blocks = record.get("blocks") or {}
    heads = _layers(subnetwork.heads, blocks.get("heads")) if subnetwork else ()
    neurons = _layers(subnetwork.neurons, blocks.get("neurons")) if subnetwork else ()
    seconds = record.get("seconds") or {}
    return View(
        index=index,
        record=record,
        name=str(record["name"]),
        model=short_name(record["model"]),
        method=str(record["method"].get("name", "")),
        metric=metric,
        headline=_headline(record, metric),
        summary=_summary(record, heads, neurons, tokens),
        tiles=_tiles(before, after, metric),
        rows=(*rows, *latency, *metrics),
        terms=tuple(_term(term) for term in record["budget"].get("terms", ())),
        forecasts=_forecasts(record.get("predicted") or {}, after),
        stages=stages_of(seconds),
        total=numbers.seconds_text(sum(seconds.values())),
        setting=setting_text(record.get("latency_setting") or {}),
        heads=heads,
        neurons=neurons,
        tokens=tokens,
        subnetwork=subnetwork,
        facts=facts_of(record),
        command=str(record.get("command", "")),
    )


def short_name(model: object) -> str:
    """Last part of a path or a hub id."""
    return PurePath(str(model)).name or str(model)


def median(measurement: Record) -> float | None:
    """Median latency in milliseconds, if it was measured."""
    latency = measurement.get("latency_ms") or {}
    return latency.get("median")


def _cost_row(kind: str, before: Record, after: Record) -> Row:
    a, b = before.get(kind), after.get(kind)
    unit = numbers.unit_of(kind, (a, b))
    change, sense = numbers.share_change(a, b), numbers.cost_sense(a, b)
    return Row(numbers.quantity_name(kind), numbers.amount(a, unit), numbers.amount(b, unit), change, sense)


def _latency_rows(before: Record, after: Record) -> tuple[Row, ...]:
    rows = []
    for key, name in (("median", "Latency, median"), ("p90", "Latency, 90th percentile")):
        a, b = ((side.get("latency_ms") or {}).get(key) for side in (before, after))
        if a is not None or b is not None:
            old, new = (numbers.amount(value, (1.0, "ms")) for value in (a, b))
            rows.append(Row(name, old, new, numbers.speed(a, b), numbers.cost_sense(a, b)))
    return tuple(rows)


def _metric_rows(before: Record, after: Record) -> tuple[Row, ...]:
    rows = []
    for key, suffix in (("metrics", ""), ("test_metrics", ", test")):
        measured = before.get(key) or {}
        for metric, new in (after.get(key) or {}).items():
            old = measured.get(metric)
            texts = numbers.metric_text(metric, old), numbers.metric_text(metric, new)
            change, sense = numbers.metric_change(metric, old, new), numbers.metric_sense(old, new)
            rows.append(Row(metric_name(metric) + suffix, *texts, change, sense))
    return tuple(rows)


def metric_name(metric: str) -> str:
    """A metric's name as a heading."""
    return {"f1": "F1", "matthews": "Matthews correlation"}.get(metric, metric[:1].upper() + metric[1:])


def _tiles(before: Record, after: Record, metric: str) -> tuple[Row, ...]:
    """The numbers to see first: MACs, parameters, bytes, milliseconds, and what it cost."""
    tiles = [_cost_row(kind, before, after) for kind in ("macs", "params", "bytes") if kind in after]
    tiles += [row for row in _latency_rows(before, after) if row.name.endswith("median")]
    tiles += [row for row in _metric_rows(before, after) if row.name == metric_name(metric)]
    return tuple(tiles)


def _headline(record: Record, metric: str) -> str:
    before, after = record["before"], record["after"]
    parts = _ended(record)
    macs = numbers.share_change(before.get("macs"), after.get("macs"))
    if parts:  # nothing was cut: what shrank is the file, and the same kernels ran before and after
        size = numbers.share_change(before.get("bytes"), after.get("bytes"))
        parts.append(f"file {size.lstrip('−+')} {'smaller' if size.startswith('−') else 'larger'}")
    elif macs != numbers.MISSING:
        parts.append(f"{macs.lstrip('−+')} {'fewer' if macs.startswith('−') else 'more'} MACs")
    speed = numbers.speed(median(before), median(after))
    if speed != numbers.MISSING and not (parts and _ended(record)):
        parts.append(speed)
    change = numbers.metric_change(
        metric, (before.get("metrics") or {}).get(metric), (after.get("metrics") or {}).get(metric)
    )
    if change != numbers.MISSING:
        parts.append(f"{metric_name(metric) if metric == 'f1' else metric} {change}")
    return f"{short_name(record['model'])}: {', '.join(parts) or record['name']}"


def _ended(record: Record) -> list[str]:
    """What became of a model whose units all stay: zeros, or operands of few bits."""
    before, after = record["before"].get("macs"), record["after"].get("macs")
    if before != after:
        return []
    wording = {"sparsity": "{:.1%} zeros in the layers' maps", "bits": "operands of {:g} bits"}
    terms = record["budget"].get("terms") or ()
    return [wording[t["kind"]].format(float(t["reached"])).replace("%", " %") for t in terms if t["kind"] in wording]


def _tokens(edits: list[Record]) -> tuple[Layer, ...]:
    """Tokens that leave each layer, of those there were, where an edit eliminates them."""
    for edit in edits:
        if edit.get("type") == "drop_tokens":
            kept = counts(
                [edit["tokens"]],
                shares(edit["profile"], edit["alpha"], edit["least"], edit["steeper"]),
                edit["protected"] + edit["recent"],
            )
            return tuple(Layer(str(i), row[0], edit["tokens"]) for i, row in enumerate(kept))
    return ()


def _summary(record: Record, heads: tuple[Layer, ...], neurons: tuple[Layer, ...], tokens: tuple[Layer, ...]) -> str:
    kept = [
        f"{sum(layer.kept for layer in layers):,} of {sum(layer.units for layer in layers):,} {what}"
        for layers, what in ((heads, "attention heads"), (neurons, "neurons"))
        if layers
    ]
    if tokens:
        kept.append(f"{tokens[-1].kept:,} of {tokens[-1].units:,} tokens in the last layer")
    task, budget = record["task"], record["budget"].get("text", "")
    name = str(record["method"].get("name", "")).upper()
    made = f"{name} kept {' and '.join(kept)}" if kept else str(record["name"])
    if ended := _ended(record):
        made = f"{name}: {' and '.join(ended)}"
    given = record.get("given_bytes")
    if given and abs(given / record["before"]["bytes"] - 1) > 0.01:
        made += (
            f". The file as given has {numbers.amount(given, numbers.unit_of('bytes', [given]))}, in another precision"
        )
    examples = f", {task['examples']:,} examples" if isinstance(task.get("examples"), int) else ""
    where = f"{task.get('name', '')} ({task.get('split', '')}{examples})"
    return f"{made}. Budget: {budget}. Measured on {where}{_interval(task)}."


def _interval(task: Record) -> str:
    """The difference of the deciding metric with its interval, or nothing if it was not computed."""
    metric, difference = str(task.get("metric", "")), task.get("difference")
    if not difference:
        return ""
    point, low, high = (numbers.metric_change(metric, 0.0, float(value)) for value in difference)
    return f": {metric_name(metric)} {point}, 95 % interval {low} to {high} by paired bootstrap over examples"


def _term(term: Record) -> Term:
    kind, limit, reached = str(term["kind"]), float(term["limit"]), float(term["reached"])
    unit = numbers.LEAST.get(kind) or numbers.unit_of(kind, (limit, reached))
    used = f"{100 * reached / limit:.1f} %" if limit else numbers.MISSING
    met = bool(term.get("met", reached <= limit))
    name, asked = numbers.quantity_name(kind), str(term.get("asked", ""))
    return Term(name, asked, numbers.amount(limit, unit), numbers.amount(reached, unit), used, met)


def _forecasts(predicted: Record, after: Record) -> tuple[Forecast, ...]:
    rows = []
    for kind, value in predicted.items():
        measured = median(after) if kind == "latency_ms" else after.get(kind)
        unit = numbers.unit_of(kind, (value, measured))
        texts = numbers.amount(value, unit), numbers.amount(measured, unit)
        rows.append(Forecast(numbers.quantity_name(kind), *texts, numbers.share_change(measured, value)))
    return tuple(rows)


def stages_of(seconds: Record) -> tuple[Stage, ...]:
    """Stages of a run with the time of each."""
    longest = max(seconds.values(), default=0.0) or 1.0
    return tuple(
        Stage(str(name), numbers.seconds_text(value), round(100 * value / longest, 2))
        for name, value in seconds.items()
    )


def setting_text(setting: Record) -> str:
    """Batch, tokens, threads and dtype in words."""
    parts = [f"{key} {setting[key]}" for key in ("batch", "tokens", "threads") if key in setting]
    return ", ".join([*parts, *([str(setting["dtype"])] if "dtype" in setting else [])])


def _layers(masks: Sequence[Sequence[bool]], names: Sequence[str] | None) -> tuple[Layer, ...]:
    labels = block_labels(names) if names and len(names) == len(masks) else [str(i) for i in range(len(masks))]
    return tuple(Layer(label, sum(mask), len(mask)) for label, mask in zip(labels, masks, strict=True))


def block_labels(names: Sequence[str]) -> list[str]:
    """Shortest labels that tell blocks apart: the layer's index, with stack and block where there are several."""
    parsed = [re.fullmatch(r"(.*?)\.?(\d+)(?:\.(.*))?", name) for name in names]
    if not all(parsed):
        return list(names)
    parts = [(m[1].split(".")[0], m[2], (m[3] or "").split(".")[-1]) for m in parsed if m]
    stacks = len({stack for stack, _, _ in parts}) > 1
    several = len({(stack, index) for stack, index, _ in parts}) < len(parts)
    labels = [
        " ".join([*([stack] if stacks else []), index, *([block] if several else [])]) for stack, index, block in parts
    ]
    return labels if len(set(labels)) == len(labels) else list(names)


def facts_of(record: Record) -> tuple[tuple[str, str], ...]:
    """What is needed to make the numbers again."""
    method = {key: value for key, value in record["method"].items() if key != "name"}
    facts = [
        ("model", str(record["model"])),
        ("method", ", ".join([str(record["method"].get("name", "")), *_pairs(method)])),
        ("budget", str(record["budget"].get("text", ""))),
        ("task", ", ".join(_pairs(record["task"]))),
        ("data", ", ".join(_pairs(record.get("data") or {}))),
        ("seed", str(record.get("seed", ""))),
        ("machine", ", ".join(_pairs(record.get("machine") or {}))),
        ("versions", ", ".join(_pairs({"secateur": record.get("secateur"), **(record.get("versions") or {})}))),
        ("edits", ", ".join(str(edit.get("type", "")) for edit in record.get("edits") or ())),
    ]
    return tuple((name, text) for name, text in facts if text)


def _pairs(values: Record) -> list[str]:
    return [f"{key} {_plain(value)}" for key, value in values.items() if value not in (None, "", [], {})]


def _plain(value: object) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(_pairs(value)) + ")"
    if isinstance(value, list | tuple):
        return " ".join(_plain(item) for item in value)
    return str(value)
