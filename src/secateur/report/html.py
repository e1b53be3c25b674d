"""The report as one HTML file that needs no network."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from secateur.report import numbers
from secateur.report.cuts import cuts, score_distributions
from secateur.report.front import FrontView, as_results, details, front_figures, front_views, volume_figure
from secateur.report.numbers import Sense
from secateur.report.trade import AXES, COLOURS, series_of, trade_offs
from secateur.report.view import Record, View, median, views


def render(records: Sequence[Record]) -> str:
    """One page for one result or front, or for several to compare.

    Args:
        records: contents of `result.json` and `front.json`.

    Returns:
        HTML with style, script and data inside; it loads nothing.

    Raises:
        SecateurError: there is none, or one is not the content of such a file that this version reads.
    """
    fronts = front_views([record for record in records if "points" in record])
    results = [record for record in records if "points" not in record]
    shown = views(results) if results or not fronts else ()
    several = len(records) > 1
    everything: list[View | FrontView] = [*shown, *fronts]
    metrics = {view.metric for view in everything}
    trades = trade_offs(shown)  # of a single front its own charts show more
    if several:
        trades = trade_offs([*shown, *views_of(fronts, len(shown))], tuple(AXES))
    sections = [_section(view) for view in shown]
    fronts_shown = [{"view": view, "figures": front_figures(view)} for view in fronts]
    volumes = [volume_figure(fronts)] if fronts else []
    figures = [*trades, *volumes]
    figures += [figure for section in sections for figure in (*section["cuts"], *section["scores"])]
    figures += [figure for section in fronts_shown for figure in section["figures"]]  # type: ignore[attr-defined]
    return (
        _environment()
        .get_template("template.html.j2")
        .render(
            title=_several(shown, fronts) if several else everything[0].headline,
            several=several,
            views=shown,
            fronts=fronts_shown,
            volumes=volumes,
            points=_json_for_script({view.id: details(view) for view in fronts}),
            trades=trades,
            sections=sections,
            comparison=comparison(shown),
            metric=metrics.pop() if len(metrics) == 1 else "metric",
            figures=_json_for_script({figure.id: {"data": figure.data, "layout": figure.layout} for figure in figures}),
            plotly=Markup(get_plotlyjs()),  # the library's own text, which autoescape would break
        )
    )


def views_of(fronts: Sequence[FrontView], first: int) -> list[View]:
    """The judged points of fronts as results, numbered from `first`."""
    records = [record for front in fronts for record in as_results(front)]
    return [replace(view, index=first + view.index) for view in views(records)] if records else []


def write_report(records: Sequence[Record], path: str | Path) -> Path:
    """Write `render(records)` to a file, whole or not at all.

    Returns:
        The path.
    """
    target = Path(path).expanduser().absolute()
    text = render(records)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
    return target


def _section(view: View) -> dict[str, Any]:
    prefix = f"r{view.index}"
    # long labels leave no room for three charts side by side
    side_by_side = all(len(layer.label) <= 3 for layer in (*view.heads, *view.neurons))
    return {
        "id": prefix,
        "view": view,
        "cuts": cuts(view, prefix),
        "scores": score_distributions(view, prefix),
        "columns": "columns three" if side_by_side else "columns",
    }


def _several(shown: Sequence[View], fronts: Sequence[FrontView]) -> str:
    models = sorted({view.model for view in shown} | {view.model for view in fronts})
    counts = [
        f"{len(found)} {what}{'s' * (len(found) > 1)}"
        for found, what in ((shown, "result"), (fronts, "front"))
        if found
    ]
    return f"{' and '.join(counts)} for {', '.join(models) if len(models) <= 3 else f'{len(models)} models'}"


@dataclass(frozen=True)
class Line:
    """A line of the comparison: a result, or the dense model that results start from."""

    name: str
    dense: bool
    budget: str
    macs: str
    params: str
    bytes: str
    latency: str
    speed: str
    speed_sense: Sense
    metric: str
    change: str
    metric_sense: Sense
    id: str = ""
    colour: int = 0


def comparison(shown: Sequence[View]) -> list[Line]:
    """Results line by line, each model's dense line before the first result of it."""
    lines: list[Line] = []
    seen: set[tuple[Any, ...]] = set()
    series = series_of(shown)
    for view in shown:
        origin = (view.record["model"], view.record["before"].get("macs"), view.metric)
        if origin not in seen:
            seen.add(origin)
            lines.append(_line(view, "before", f"dense {view.model}", dense=True))
        lines.append(_line(view, "after", view.name, id=f"r{view.index}", colour=series[view.index].index % COLOURS))
    return lines


def _line(view: View, side: str, name: str, *, dense: bool = False, id: str = "", colour: int = 0) -> Line:
    before, here = view.record["before"], view.record[side]
    old, new = ((m.get("metrics") or {}).get(view.metric) for m in (before, here))
    costs = {
        kind: numbers.amount(here.get(kind), numbers.unit_of(kind, [here.get(kind)]))
        for kind in ("macs", "params", "bytes")
    }
    return Line(
        name=name,
        dense=dense,
        budget="" if dense else str(view.record["budget"].get("text", "")).replace(",", ", "),
        **costs,
        latency=numbers.amount(median(here), (1.0, "ms")),
        speed="" if dense else numbers.speed(median(before), median(here)),
        speed_sense=numbers.cost_sense(median(before), median(here)),
        metric=numbers.metric_text(view.metric, new),
        change="" if dense else numbers.metric_change(view.metric, old, new),
        metric_sense=numbers.metric_sense(old, new),
        id=id,
        colour=colour,
    )


@cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _json_for_script(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in; numbers that JSON lacks become null."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return Markup(text)  # escaped above


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
