"""What the report's charts share: plotly.js figures in plain dictionaries.

Colours are names of CSS variables ("--kept"): the page fills them in for light, dark and print.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any

FONT = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif", "size": 13}

Trace = dict[str, Any]


@dataclass(frozen=True)
class Figure:
    """A chart with its heading and the sentence that says how to read it."""

    id: str
    title: str
    caption: str
    data: list[Trace]
    layout: dict[str, Any]
    height: int


def layout(**settings: Any) -> dict[str, Any]:
    """A transparent, fixed chart, with settings of its own."""
    base: dict[str, Any] = {
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "font": FONT | {"color": "--muted"},
        "showlegend": False,
        "autosize": True,
        "dragmode": False,
        "hoverlabel": {"bgcolor": "--surface", "bordercolor": "--line", "font": {"color": "--ink"}},
    }
    for axis in ("xaxis", "yaxis"):
        settings[axis] = {"fixedrange": True, "linecolor": "--line", "automargin": False} | settings.get(axis, {})
    return base | settings


def escape(text: str) -> str:
    """Text of the user for a label: plotly reads a little HTML there."""
    return html.escape(text, quote=False)
