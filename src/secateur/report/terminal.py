"""The report as tables for the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from secateur.report import numbers
from secateur.report.front import FrontView, front_views
from secateur.report.view import Record, View, median, metric_name, views

_STYLES = {"better": "green", "worse": "red", "same": ""}


def table(results: Sequence[Record]) -> Table:
    """Before and after of one result, or one line per result if there are several.

    Args:
        results: contents of `result.json`.

    Raises:
        SecateurError: there is no result, or one is not the content of a `result.json` this version reads.
    """
    shown = views(results)
    return _before_after(shown[0]) if len(shown) == 1 else _comparison(shown)


def print_report(records: Sequence[Record], console: Console | None = None) -> None:
    """Print the table of results, of a single one its headline, budget and setting too, and the points of fronts."""
    out = console or Console()
    fronts = front_views([record for record in records if "points" in record])
    for front in fronts:
        out.print(Text(front.headline, style="bold"))
        out.print(Text(front.summary))
        out.print(_points(front))
        if front.setting:
            out.print(Text(f"MACs and latency: {front.setting}", style="dim"))
    results = [record for record in records if "points" not in record]
    if fronts and not results:
        return
    shown = views(results)
    if len(shown) > 1:
        out.print(_comparison(shown))
        return
    view = shown[0]
    out.print(Text(view.headline, style="bold"))
    out.print(Text(view.summary))
    out.print(_before_after(view))
    for term in view.terms:
        verdict = Text("met" if term.met else "missed", style="green" if term.met else "red")
        bound = "least" if term.name in map(numbers.quantity_name, numbers.LEAST) else "most"
        out.print(Text(f"{term.name}: {term.reached} of at {bound} {term.limit} (asked {term.asked}), ") + verdict)
    for forecast in view.forecasts:
        if forecast.name.startswith("Latency"):
            out.print(Text(f"Latency predicted {forecast.predicted}, measured {forecast.measured} ({forecast.error})"))
    if view.setting:
        out.print(Text(f"MACs and latency: {view.setting}", style="dim"))


def _points(view: FrontView) -> Table:
    made = Table(title=Text(view.name), title_justify="left", header_style="bold")
    made.add_column("point", justify="right")
    made.add_column("keeps", overflow="fold")
    for heading in (
        *view.costs,
        "error",
        metric_name(view.metric),
        f"change{view.unit}",
        *(["measured"] if view.timed else []),
    ):
        made.add_column(heading, justify="right")
    for line in view.lines:
        cells = [str(line.number), line.keeps, *line.costs, line.error, line.metric, line.change]
        made.add_row(*(Text(cell) for cell in (*cells, *([line.speed] if view.timed else []))))
    return made


def _before_after(view: View) -> Table:
    made = Table(title=Text(view.name), title_justify="left", header_style="bold")
    made.add_column("")
    for heading in ("before", "after", "change"):
        made.add_column(heading, justify="right")
    for row in view.rows:
        made.add_row(Text(row.name), Text(row.before), Text(row.after), Text(row.change, style=_STYLES[row.sense]))
    return made


def _comparison(shown: Sequence[View]) -> Table:
    metrics = list(dict.fromkeys(view.metric for view in shown if view.metric))
    made = Table(header_style="bold")
    made.add_column("result", overflow="fold")
    changes = [heading for metric in metrics for heading in (metric_name(metric), "change")]
    for heading in ("MACs", "params", "size", "ms", "speed", *changes):
        made.add_column(heading, justify="right", no_wrap=True)
    for view in shown:
        before, after = view.record["before"], view.record["after"]
        cells = [Text(view.name)]
        cells += [Text(_share(before.get(kind), after.get(kind))) for kind in ("macs", "params")]
        cells.append(Text(numbers.amount(after.get("bytes"), numbers.unit_of("bytes", [after.get("bytes")]))))
        cells.append(Text(numbers.amount(median(after), (1.0, "ms")).removesuffix(" ms")))
        cells.append(
            Text(_speed_up(median(before), median(after)), _STYLES[numbers.cost_sense(median(before), median(after))])
        )
        for metric in metrics:
            old, new = ((side.get("metrics") or {}).get(metric) for side in (before, after))
            cells.append(Text(numbers.metric_text(metric, new)))
            change = numbers.metric_change(metric, old, new).removesuffix(" points")
            cells.append(Text(change, style=_STYLES[numbers.metric_sense(old, new)]))
        made.add_row(*cells)
    return made


def _share(before: float | None, after: float | None) -> str:
    return f"{100 * after / before:.1f} %" if before and after is not None else numbers.MISSING


def _speed_up(before: float | None, after: float | None) -> str:
    return f"{before / after:.2f}×" if before and after else numbers.MISSING
