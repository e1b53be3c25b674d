"""The table of a latency dial: for the terminal, as JSON, and as one self-contained HTML page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import plotly.graph_objects as go

Record = dict[str, Any]


def print_dial(table: Record, console: Console | None = None) -> None:
    """Print a table of `api.dial`."""
    rows, setting = table["rows"], table["setting"]
    made = Table(header_style="bold")
    names = list(rows[0].get("metrics", {}))
    for heading in ("speed-up", "MACs", "ms", "p90", "measured", *names):
        made.add_column(heading, justify="right")
    for row in rows:
        latency = row["latency_ms"]
        made.add_row(
            f"{row['speedup']:g}",
            f"{row['macs'] / 1e6:,.1f} M",
            f"{latency['median']:.2f}",
            f"{latency['p90']:.2f}",
            f"{row['measured']:.2f}",
            *(f"{row['metrics'][name]:.4f}" for name in names),
        )
    out = console or Console()
    out.print(made)
    out.print(
        f"batch {setting['batch']}, {setting['tokens']} tokens, {setting['threads']} threads, {setting['dtype']}; "
        "measured: milliseconds of the dense model over these"
    )


def write_dial(table: Record, folder: Path) -> None:
    """Write `dial.json` and `dial.html` into a folder, each whole or not at all."""
    texts = {
        "dial.json": json.dumps(table, indent=1) + "\n",
        "dial.html": figure(table).to_html(include_plotlyjs=True, full_html=True),
    }
    for name, text in texts.items():
        fresh = folder / f".{name}.tmp"
        fresh.write_text(text, encoding="utf-8")
        os.replace(fresh, folder / name)


def figure(table: Record) -> go.Figure:
    """The first metric against milliseconds, and the measured speed-up against that of the MACs."""
    import plotly.graph_objects as go  # half a second, which no other verb should wait for
    from plotly.subplots import make_subplots

    rows, setting = table["rows"], table["setting"]
    metric = next(iter(rows[0].get("metrics", {})), None)
    titles = ["Measured against counted speed-up"]
    if metric is not None:
        titles.insert(0, f"{metric} against milliseconds")
    made = make_subplots(rows=1, cols=len(titles), subplot_titles=titles)
    labels = [f"{row['speedup']:g}×" for row in rows]
    if metric is not None:
        line = go.Scatter(
            x=[row["latency_ms"]["median"] for row in rows],
            y=[row["metrics"][metric] for row in rows],
            text=labels,
            mode="lines+markers+text",
            textposition="top center",
            hovertemplate="%{text}: %{x:.2f} ms, %{y:.4f}<extra></extra>",
        )
        made.add_trace(line, row=1, col=1)
        made.update_xaxes(title_text="milliseconds, median", rangemode="tozero", row=1, col=1)
    last = len(titles)
    theory = [row["theory"] for row in rows]
    measured = go.Scatter(x=theory, y=[row["measured"] for row in rows], text=labels, mode="lines+markers")
    made.add_trace(measured, row=1, col=last)
    made.add_trace(
        go.Scatter(x=theory, y=theory, mode="lines", line={"dash": "dot"}, hoverinfo="skip"), row=1, col=last
    )
    made.update_xaxes(title_text="speed-up by MACs", row=1, col=last)
    made.update_layout(
        showlegend=False,
        template="plotly_white",
        title=f"Latency dial: batch {setting['batch']}, {setting['tokens']} tokens, {setting['threads']} threads, "
        f"{setting['dtype']}, {table['machine'].get('cpu', '')}",
    )
    return made
