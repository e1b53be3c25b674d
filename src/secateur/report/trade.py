"""Charts of what a cut cost: metric against MACs, milliseconds and bytes."""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from secateur.report import numbers
from secateur.report.plot import Figure, Trace, escape, layout
from secateur.report.view import View, median, metric_name

COLOURS = 8
"""Colours in the style sheet, `--series-0` and on."""
STARS = ("star", "star-diamond", "star-square", "star-triangle-up")
"""Symbols of the dense models."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "triangle-down", "pentagon", "hexagon")


AXES = {
    "macs": ("MACs", "MACs", "Up and left is better; the star is the dense model."),
    "latency": ("milliseconds", "Latency, median", "Up and left is better; whiskers reach the 90th percentile."),
    "bytes": ("bytes", "Size on disk", "Up and left is better; the star is the dense model."),
}
"""What charts have below: in the heading, as the axis' title, and how to read it."""


def trade_offs(views: Sequence[View], axes: Sequence[str] = ("macs", "latency")) -> list[Figure]:
    """Metric against MACs, milliseconds or bytes, for each task and metric.

    Args:
        views: results.
        axes: of `AXES`.
    """
    series = series_of(views)
    groups: dict[tuple[str, str], list[View]] = {}
    for view in views:
        if _metric(view, "after") is not None:
            groups.setdefault((str(view.record["task"].get("name", "")), view.metric), []).append(view)
    figures = []
    for number, ((task, metric), members) in enumerate(groups.items()):
        where = f" on {task}" if len(groups) > 1 else ""
        for axis in axes:
            points = [view for view in members if _cost(view, "after", axis) is not None]
            if points:
                heading = f"{metric_name(metric)} against {AXES[axis][0]}{where}"
                figures.append(_trade_off(f"trade-{axis}-{number}", heading, points, series, axis, metric))
    return figures


def _trade_off(name: str, heading: str, views: list[View], series: dict[int, Series], axis: str, metric: str) -> Figure:
    scale = 100 if numbers.is_fraction(metric) else 1
    unit = numbers.unit_of(axis, [_cost(view, side, axis) for view in views for side in ("before", "after")])
    traces = [_line(members, axis, metric, unit, scale) for members in _by_series(views, series)]
    traces += [_dense(i, members, axis, metric, unit, scale) for i, members in enumerate(_by_model(views))]
    ys = [y for trace in traces for y in trace["y"]]
    margin = max(0.12 * (max(ys) - min(ys)), 0.2 if scale == 100 else 0.004)
    shape = layout(
        xaxis={
            "title": {"text": f"{AXES[axis][1]} ({unit[1]})", "standoff": 8},
            "rangemode": "tozero",
            "gridcolor": "--line",
            "zeroline": False,
        },
        yaxis={
            "title": {"text": metric_name(metric) + (" (%)" if scale == 100 else ""), "standoff": 10},
            "range": [min(ys) - margin, max(ys) + margin],
            "gridcolor": "--line",
            "zeroline": False,
            "nticks": 7,
        },
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "x": 0, "xanchor": "left", "yanchor": "bottom", "entrywidth": 0},
        margin={"l": 58, "r": 18, "t": 30 + 20 * ((len(traces) - 1) // 3), "b": 48},
    )
    return Figure(name, heading, AXES[axis][2], traces, shape, 330 + 20 * ((len(traces) - 1) // 3))


@dataclass(frozen=True)
class Series:
    """Results of one method, with the same hyper-parameters, on one model: one colour, symbol and line."""

    index: int
    name: str


def series_of(views: Sequence[View]) -> dict[int, Series]:
    """The series of each result, by `View.index`.

    A series is named by its method; by method and model if several models share the method; by its first result if that
    does not tell it apart either.
    """
    keys = [(view.model, json.dumps(view.record["method"], sort_keys=True, default=str)) for view in views]
    firsts = dict(zip(reversed(keys), reversed(views), strict=True))
    order = list(dict.fromkeys(keys))
    choices = [[firsts[key].method, f"{firsts[key].method}, {key[0]}"] for key in order]
    shared = Counter(name for names in choices for name in names)
    series = {}
    for index, (key, names) in enumerate(zip(order, choices, strict=True)):
        name = next((name for name in names if name and shared[name] == 1), firsts[key].name)
        series[key] = Series(index, name)
    return {view.index: series[key] for key, view in zip(keys, views, strict=True)}


def _by_series(views: list[View], series: dict[int, Series]) -> list[tuple[Series, list[View]]]:
    groups: dict[int, tuple[Series, list[View]]] = {}
    for view in views:
        found = series[view.index]
        groups.setdefault(found.index, (found, []))[1].append(view)
    return [groups[index] for index in sorted(groups)]


def _by_model(views: list[View]) -> list[list[View]]:
    groups: dict[tuple[Any, Any], list[View]] = {}
    for view in views:
        groups.setdefault((view.record["model"], view.record["before"].get("macs")), []).append(view)
    return list(groups.values())


def _line(group: tuple[Series, list[View]], axis: str, metric: str, unit: tuple[float, str], scale: int) -> Trace:
    series, views = group
    views = sorted(views, key=lambda view: _cost(view, "after", axis) or 0.0)
    colour = f"--series-{series.index % COLOURS}"
    xs = [(_cost(view, "after", axis) or 0.0) / unit[0] for view in views]
    trace: Trace = {
        "type": "scatter",
        "mode": "lines+markers" if len(views) > 1 else "markers",
        "name": escape(series.name),
        "x": xs,
        "y": [(_metric(view, "after") or 0.0) * scale for view in views],
        "customdata": [escape(view.name) for view in views],
        "marker": _marker(SYMBOLS[series.index % len(SYMBOLS)], 12, colour),
        "line": {"width": 1.5, "color": colour},
        "hovertemplate": f"%{{y:.4g}} at %{{x:.4g}} {unit[1]}<extra>%{{customdata}}</extra>",
    }
    if axis == "latency":
        trace["error_x"] = _whiskers([_p90(view, "after") for view in views], xs, colour)
    return trace


def _dense(index: int, views: list[View], axis: str, metric: str, unit: tuple[float, str], scale: int) -> Trace:
    """The dense model once, at the median of what the runs measured of it."""
    costs = [cost for view in views if (cost := _cost(view, "before", axis)) is not None]
    values = [value for view in views if (value := _metric(view, "before")) is not None]
    known = bool(costs and values)
    name = escape(f"dense {views[0].model}")
    return {
        "type": "scatter",
        "mode": "markers",
        "name": name,
        "x": [statistics.median(costs) / unit[0]] if known else [],
        "y": [values[0] * scale] if known else [],
        "marker": _marker(STARS[index % len(STARS)], 16, "--ink"),
        "hovertemplate": f"%{{y:.4g}} at %{{x:.4g}} {unit[1]}<extra>{name}</extra>",
    }


def _marker(symbol: str, size: int, colour: str) -> dict[str, Any]:
    return {"symbol": symbol, "size": size, "color": colour, "line": {"width": 1, "color": "--page"}}


def _whiskers(ends: list[float | None], starts: list[float], colour: str) -> dict[str, Any]:
    lengths = [0.0 if end is None else max(0.0, end - start) for end, start in zip(ends, starts, strict=True)]
    return {
        "type": "data",
        "symmetric": False,
        "array": lengths,
        "arrayminus": [0.0] * len(lengths),
        "thickness": 1.2,
        "width": 4,
        "color": colour,
    }


def _p90(view: View, side: str) -> float | None:
    return (view.record[side].get("latency_ms") or {}).get("p90")


def _cost(view: View, side: str, axis: str) -> float | None:
    measurement = view.record[side]
    return median(measurement) if axis == "latency" else measurement.get(axis)


def _metric(view: View, side: str) -> float | None:
    value = (view.record[side].get("metrics") or {}).get(view.metric)
    return value if value is not None and math.isfinite(value) else None
