"""What a page shows of a front: its points, what each keeps, how the search went."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from secateur.errors import SecateurError
from secateur.optimize.points import ERROR, Point
from secateur.report import numbers
from secateur.report.plot import Figure, Trace, escape, layout
from secateur.report.view import Record, Stage, block_labels, facts_of, metric_name, setting_text, short_name, stages_of

_NEEDED = ("name", "model", "task", "method", "objectives", "dense", "points", "front", "judged", "volumes")


@dataclass(frozen=True)
class Line:
    """A point of the front as a line of the table."""

    number: int
    keeps: str
    costs: tuple[str, ...]
    error: str
    metric: str
    change: str
    speed: str


@dataclass(frozen=True)
class FrontView:
    """One front, ready to print; `index` is its place among those shown."""

    index: int
    record: Record = field(repr=False)
    points: dict[int, Point] = field(repr=False)
    front: tuple[Point, ...] = field(repr=False)
    name: str
    model: str
    metric: str
    headline: str
    summary: str
    objectives: tuple[str, ...]
    lines: tuple[Line, ...]
    timed: bool
    setting: str
    stages: tuple[Stage, ...]
    total: str
    facts: tuple[tuple[str, str], ...]
    command: str

    @property
    def id(self) -> str:
        """Name of its section on the page."""
        return f"f{self.index}"

    @property
    def unit(self) -> str:
        """What a change is in, after its heading."""
        return ", points" if numbers.is_fraction(self.metric) else ""

    @property
    def costs(self) -> tuple[str, ...]:
        """The objectives but for the error."""
        return tuple(name for name in self.objectives if name != ERROR)


def front_views(records: Sequence[Record]) -> tuple[FrontView, ...]:
    """Check and prepare fronts.

    Raises:
        SecateurError: one is not the content of a `front.json` this version reads.
    """
    return tuple(_checked(index, record) for index, record in enumerate(records))


def _checked(index: int, record: Record) -> FrontView:
    missing = [key for key in _NEEDED if key not in record]
    if missing:
        raise SecateurError(f"This is no front.json of secateur: it lacks {', '.join(missing)}.")
    try:
        view = _view(index, record)
        front_figures(view), details(view), as_results(view)  # what is damaged shows here
        return view
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise SecateurError(
            f"The front.json of '{record['name']}' is damaged ({type(error).__name__}: {error})."
        ) from error


def _view(index: int, record: Record) -> FrontView:
    points = {point["number"]: Point.from_dict(point) for point in record["points"]}
    front = tuple(points[number] for number in record["front"])
    task, metric = record["task"], str(record["task"]["metric"])
    limits = f"Limits: {record['budget']}. " if record.get("budget") else ""
    seen = ", rows that the search chose by, which flatters it" if task.get("searched") else ""
    seconds = record.get("seconds") or {}
    model = short_name(record["model"])
    shown = {**record, "budget": {"text": record.get("budget") or ""}}
    return FrontView(
        index=index,
        record=record,
        points=points,
        front=front,
        name=str(record["name"]),
        model=model,
        metric=metric,
        headline=f"{model}: {len(front)} sub-networks to choose from",
        summary=f"{len(points)} sub-networks evaluated, {len(front)} of them on the front. {limits}Judged on "
        f"{task['name']} ({task['split']}, {task['examples']:,} examples{seen}); 95 % intervals by paired bootstrap "
        "over examples, against the model as given.",
        objectives=tuple(record["objectives"]),
        lines=tuple(_line(record, point, metric) for point in front),
        timed=any("speed" in found for found in record["judged"].values()),
        setting=setting_text(record.get("setting") or {}),
        stages=stages_of(seconds),
        total=numbers.seconds_text(sum(seconds.values())),
        facts=facts_of(shown),
        command=str(record.get("command", "")),
    )


def _line(record: Record, point: Point, metric: str) -> Line:
    found = record["judged"].get(str(point.number)) or {}
    change = ""
    if found:
        mean, low, high = (numbers.metric_change(metric, 0.0, float(value)) for value in found["difference"])
        change = f"{mean} ({low} to {high})".replace(" points", "")
    costs = [name for name in record["objectives"] if name != ERROR]
    return Line(
        number=point.number,
        keeps=keeps(point),
        costs=tuple(cost_text(record, kind, point.costs[kind]) for kind in costs),
        error=f"{point.error:.4f}",
        metric=numbers.metric_text(metric, (found.get("metrics") or {}).get(metric)),
        change=change,
        speed=f"{found['latency_ms']['median']:.2f} ms, {found['speed']:.2f}×" if "speed" in found else "",
    )


def cost_text(record: Record, kind: str, cost: float) -> str:
    """A cost and its share of the dense model's."""
    dense = record["dense"]["costs"][kind]
    return f"{numbers.amount(cost, numbers.unit_of(kind, [dense]))} ({100 * cost / dense:.0f} %)"


def keeps(point: Point) -> str:
    """What a point keeps, in words: "4 layers of 8 heads and 512 neurons", or the numbers of each layer."""
    layers = list(zip(point.sub.head_widths, point.sub.neuron_widths, strict=True))
    there = [layer for layer in layers if any(layer)]
    if not there:
        return "no layers"
    if len(set(there)) == 1:
        counts = (len(there), "layer"), (there[0][0], "head"), (there[0][1], "neuron")
        layers_of, heads, neurons = (f"{count:,} {what}{'' if count == 1 else 's'}" for count, what in counts)
        return f"{layers_of} of {heads} and {neurons}"
    return "; ".join(f"{heads} + {neurons:,}" for heads, neurons in layers)


def as_results(view: FrontView) -> list[Record]:
    """The judged points as results, for charts that compare methods."""
    record, dense = view.record, view.record["dense"]

    def measured(costs: Mapping[str, float], metrics: Any, milliseconds: float | None) -> dict[str, Any]:
        latency = {} if milliseconds is None else {"latency_ms": {"median": milliseconds}}
        return {"macs": costs["macs"], "bytes": costs["size"], "metrics": metrics, **latency}

    made: list[Record] = []
    for point in view.front:
        if (found := record["judged"].get(str(point.number))) is None:
            continue
        here = found["latency_ms"]["median"] if "speed" in found else None
        made.append(
            {
                "name": f"{view.name}, point {point.number}",
                "model": record["model"],
                "task": record["task"],
                "method": record["method"],
                "budget": {"text": ""},
                "before": measured(dense["costs"], dense["metrics"], here and here * found["speed"]),
                "after": measured(point.costs, found["metrics"], here),
            }
        )
    return made


def details(view: FrontView) -> list[dict[str, Any]]:
    """What the page tells of a point that is picked: its numbers, its layers, the command that cuts it out."""
    blocks = view.record.get("blocks") or {}
    labels = block_labels(blocks["heads"]) if blocks.get("heads") else None
    full = view.points[min(view.points)].sub
    folder = str(view.record.get("folder") or "folder-of-front.json")
    made = []
    for line, point in zip(view.lines, view.front, strict=True):
        rows = [(numbers.quantity_name(kind), cost_text(view.record, kind, cost)) for kind, cost in point.costs.items()]
        rows.append((f"{metric_name(view.metric)}, {view.record['task']['split']}", line.metric))
        named = ((f"Change{view.unit}", line.change), ("Measured", line.speed))
        rows += [(name, text) for name, text in named if text]
        made.append(
            {
                "number": point.number,
                "title": f"Point {point.number}: {line.keeps}",
                "rows": rows,
                "layers": [
                    {
                        "label": labels[i] if labels and i < len(labels) else str(i),
                        "heads": [sum(heads), len(full.heads[i])],
                        "neurons": [sum(neurons), len(full.neurons[i])],
                    }
                    for i, (heads, neurons) in enumerate(zip(point.sub.heads, point.sub.neurons, strict=True))
                ],
                "command": shlex.join(
                    ["secateur", "extract", folder, "--point", str(point.number), "--out", f"point-{point.number}"]
                ),
            }
        )
    return made


def front_figures(view: FrontView) -> list[Figure]:
    """The front in each cost against the metric, and the parallel coordinates of everything evaluated."""
    return [*(_trade(view, kind) for kind in view.costs), _parallel(view)]


def _trade(view: FrontView, kind: str) -> Figure:
    record, metric = view.record, view.metric
    scale = 100 if numbers.is_fraction(metric) else 1
    unit = numbers.unit_of(kind, [record["dense"]["costs"][kind]])

    def cloud(points: Sequence[Point], name: str, **settings: Any) -> Trace:
        return {
            "type": "scatter",
            "name": name,
            "x": [point.costs[kind] / unit[0] for point in points],
            "y": [(1 - point.error) * scale for point in points],
            "customdata": [point.number for point in points],
            "text": [_hover(view, point) for point in points],
            "hovertemplate": "%{text}<extra></extra>",
            **settings,
        }

    evaluated = cloud(list(view.points.values()), "evaluated", mode="markers")
    evaluated["marker"] = {"size": 6, "color": "--removed-strong"}
    line = sorted(view.front, key=lambda point: point.costs[kind])
    chosen = cloud(line, "front", mode="markers" if len(view.costs) > 1 else "lines+markers")
    chosen |= {"marker": {"size": 10, "color": "--kept"}, "line": {"width": 1.5, "color": "--kept", "shape": "hv"}}
    judged = [point for point in line if str(point.number) in record["judged"]]
    found = [record["judged"][str(point.number)] for point in judged]
    base = float(record["dense"]["metrics"][metric])
    again = cloud(judged, f"front on {record['task']['split']}", mode="markers")
    again |= {
        "y": [each["metrics"][metric] * scale for each in found],
        "marker": {"size": 9, "symbol": "diamond-open", "color": "--series-1"},
        "error_y": {
            "type": "data",
            "symmetric": False,
            "array": [(base + each["difference"][2] - each["metrics"][metric]) * scale for each in found],
            "arrayminus": [(each["metrics"][metric] - base - each["difference"][1]) * scale for each in found],
            "thickness": 1,
            "width": 3,
            "color": "--series-1",
        },
    }
    dense: Trace = {
        "type": "scatter",
        "mode": "markers",
        "name": "as given",
        "x": [record["dense"]["costs"][kind] / unit[0]],
        "y": [base * scale],
        "marker": {"symbol": "star", "size": 15, "color": "--ink"},
        "hovertemplate": "as given: %{y:.4g}<extra></extra>",
    }
    shape = layout(
        xaxis={
            "title": {"text": f"{numbers.quantity_name(kind)} ({unit[1]})".replace(" ()", ""), "standoff": 8},
            "rangemode": "tozero",
            "gridcolor": "--line",
            "zeroline": False,
        },
        yaxis={
            "title": {"text": metric_name(metric) + (" (%)" if scale == 100 else ""), "standoff": 10},
            "gridcolor": "--line",
            "zeroline": False,
            "nticks": 7,
        },
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "x": 0, "xanchor": "left", "yanchor": "bottom"},
        margin={"l": 58, "r": 18, "t": 34, "b": 48},
        hovermode="closest",
    )
    title = f"{metric_name(metric)} against {numbers.quantity_name(kind).lower() if kind != 'macs' else 'MACs'}"
    caption = "Dots: rows that the search judged by; diamonds: rows it did not choose by. Click a point of the front."
    if record["task"].get("searched"):
        caption = "Dots and diamonds: the rows that the search chose by, which flatters it. Click a point of the front."
    return Figure(f"{view.id}-{kind}", title, caption, [evaluated, chosen, again, dense], shape, 380)


def _hover(view: FrontView, point: Point) -> str:
    costs = [f"{numbers.quantity_name(kind)} {cost_text(view.record, kind, point.costs[kind])}" for kind in view.costs]
    parts = [f"point {point.number}", escape(keeps(point)), *costs, f"error {point.error:.4f}"]
    return "<br>".join(parts)


def _parallel(view: FrontView) -> Figure:
    """Parallel coordinates in plain lines, so that the page needs no WebGL."""
    points = list(view.points.values())
    axes: dict[str, list[float]] = {
        "Error" if name == ERROR else numbers.quantity_name(name): [point.of(name) for point in points]
        for name in view.objectives
    }
    axes["Layers"] = [sum(map(any, zip(p.sub.head_widths, p.sub.neuron_widths, strict=True))) for p in points]
    axes["Heads"] = [sum(p.sub.head_widths) for p in points]
    axes["Neurons"] = [sum(p.sub.neuron_widths) for p in points]
    ranges = [(min(values), max(values)) for values in axes.values()]
    places = [
        [(values[i] - low) / (high - low or 1) for values, (low, high) in zip(axes.values(), ranges, strict=True)]
        for i in range(len(points))
    ]
    front = {point.number for point in view.front}
    traces: list[Trace] = []
    for point, heights in sorted(zip(points, places, strict=True), key=lambda pair: pair[0].number in front):
        on = point.number in front
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "x": list(range(len(axes))),
                "y": heights,
                "customdata": [point.number] * len(axes),
                "line": {"width": 2 if on else 1, "color": "--kept" if on else "--removed"},
                "text": _hover(view, point),
                "hovertemplate": "%{text}<extra></extra>",
            }
        )
    kinds = ["error" if name == ERROR else name for name in view.objectives] + ["count"] * 3
    ends = [
        {
            "x": i,
            "y": y,
            "text": _end(kind, value, most),
            "showarrow": False,
            "yshift": 11 if y else -11,
            "font": {"size": 11, "color": "--muted"},
        }
        for i, (kind, (least, most)) in enumerate(zip(kinds, ranges, strict=True))
        for y, value in ((0, least), (1, most))
    ]
    shape = layout(
        xaxis={
            "tickvals": list(range(len(axes))),
            "ticktext": list(axes),
            "side": "top",
            "gridcolor": "--removed-strong",
            "zeroline": False,
            "range": [-0.3, len(axes) - 0.7],
        },
        yaxis={"visible": False, "range": [-0.1, 1.1]},
        annotations=ends,
        hovermode="closest",
        margin={"l": 20, "r": 20, "t": 34, "b": 12},
    )
    caption = "Each line is a sub-network; blue ones are on the front. Less error and less cost is lower."
    return Figure(f"{view.id}-parallel", "Everything that was evaluated", caption, traces, shape, 330)


def _end(kind: str, value: float, most: float) -> str:
    """The least or the most of an axis."""
    if kind == ERROR:
        return f"{value:.3f}"
    return f"{value:,.0f}" if kind == "count" else numbers.amount(value, numbers.unit_of(kind, [most]))


def volume_figure(views: Sequence[FrontView]) -> Figure:
    """How much the fronts covered after each evaluation, against the time that evaluations took."""
    traces: list[Trace] = []
    for view in views:
        points = list(view.points.values())
        traces.append(
            {
                "type": "scatter",
                "mode": "lines",
                "name": escape(f"{view.name}, {view.model}"),
                "x": [point.seconds for point in points],
                "y": list(view.record["volumes"]),
                "text": [f"{count + 1} evaluated" for count in range(len(points))],
                "hovertemplate": "%{y:.4f} after %{x:.1f} s, %{text}<extra></extra>",
                "line": {"width": 2, "shape": "hv", "color": f"--series-{view.index % 8}"},
            }
        )
    shape = layout(
        xaxis={"title": {"text": "seconds of evaluations"}, "gridcolor": "--line", "rangemode": "tozero"},
        yaxis={"title": {"text": "hypervolume"}, "gridcolor": "--line", "zeroline": False, "nticks": 6},
        showlegend=len(views) > 1,
        legend={"orientation": "h", "y": 1.02, "x": 0, "xanchor": "left", "yanchor": "bottom"},
        margin={"l": 58, "r": 18, "t": 34, "b": 48},
    )
    caption = "Share of the box up to the dense model's costs and an error of 1 that is dominated; more is better."
    return Figure("volumes", "Hypervolume over time", caption, traces, shape, 330)
