"""Charts of what was cut, and by which scores."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from secateur.report.plot import Figure, Trace, escape, layout
from secateur.report.view import Layer, View

NEURON_BINS = 48
SCORE_BINS = 36


def cuts(view: View, prefix: str) -> list[Figure]:
    """Which heads and which neurons went, how wide each layer is now, and how many tokens leave it."""
    figures = []
    if view.tokens:
        caption = "Tokens that a layer hands on, of those in a text of this length."
        figures.append(_widths(view.tokens, f"{prefix}-tokens", "Tokens that leave each layer", caption, "tokens"))
    if view.heads:
        figures.append(_head_map(view, f"{prefix}-heads"))
    if view.neurons:
        caption = "Neurons kept, of those there were."
        figures.append(_neuron_map(view, f"{prefix}-neurons"))
        figures.append(_widths(view.neurons, f"{prefix}-widths", "Width of each layer", caption, "neurons"))
    return figures


def _head_map(view: View, name: str) -> Figure:
    masks = view.subnetwork.heads if view.subnetwork else ()
    most = max((len(mask) for mask in masks), default=0)
    values = [[int(kept) for kept in mask] + [None] * (most - len(mask)) for mask in masks]
    marks = [["" if kept else "×" for kept in mask] + [""] * (most - len(mask)) for mask in masks]
    words = [["kept" if kept else "removed" for kept in mask] + [""] * (most - len(mask)) for mask in masks]
    trace = _heat(values, view.heads, list(range(most)))
    trace |= {
        "text": marks,
        "texttemplate": "%{text}",
        "textfont": {"color": "--muted", "size": 12},
        "xgap": 3,
        "ygap": 3,
    }
    trace |= {"customdata": words, "hovertemplate": "layer %{y}, head %{x}: %{customdata}<extra></extra>"}
    shape = layout(
        xaxis={"title": {"text": "head"}, "showgrid": False, "zeroline": False, **_ticks(most)},
        yaxis=_layer_axis(view.heads),
        margin={"l": _label_room(view.heads), "r": 12, "t": 8, "b": 48},
    )
    kept, units = _sums(view.heads)
    caption = f"{kept} of {units} heads kept; × marks a removed one."
    return Figure(name, "Attention heads", caption, [trace], shape, _rows_height(view.heads))


def _neuron_map(view: View, name: str) -> Figure:
    masks = view.subnetwork.neurons if view.subnetwork else ()
    most = max((len(mask) for mask in masks), default=0)
    bins = min(NEURON_BINS, most)
    edges = np.linspace(0, most, bins + 1).round().astype(int)
    shares: list[list[float | None]] = []
    for mask in masks:
        pieces = [mask[a:b] for a, b in pairwise(edges)]
        shares.append([round(sum(piece) / len(piece), 4) if piece else None for piece in pieces])
    ranges = [f"{a}–{b - 1}" for a, b in pairwise(edges)]
    trace = _heat(shares, view.neurons, list(range(bins)))
    trace |= {"customdata": [ranges] * len(masks), "xgap": 0, "ygap": 3}
    trace |= {"hovertemplate": "layer %{y}, neurons %{customdata}: %{z:.0%} kept<extra></extra>", "showscale": True}
    trace["colorbar"] = {"tickformat": ".0%", "tickvals": [0, 0.5, 1], "thickness": 10, "outlinewidth": 0, "len": 1}
    marks = [0, bins // 4, bins // 2, 3 * bins // 4]
    shape = layout(
        xaxis={
            "title": {"text": "neuron"},
            "showgrid": False,
            "zeroline": False,
            "tickvals": marks,
            "ticktext": [f"{edges[i]:,}" for i in marks],
        },
        yaxis=_layer_axis(view.neurons),
        margin={"l": _label_room(view.neurons), "r": 12, "t": 8, "b": 48},
    )
    kept, units = _sums(view.neurons)
    caption = f"{kept:,} of {units:,} neurons kept, in the model's own order."
    return Figure(name, "Neurons", caption, [trace], shape, _rows_height(view.neurons))


def _widths(layers: Sequence[Layer], name: str, title: str, caption: str, what: str) -> Figure:
    labels = [escape(layer.label) for layer in layers]
    rows = list(range(len(layers)))
    bar = {"type": "bar", "orientation": "h", "y": rows, "customdata": labels}
    kept = bar | {
        "name": "kept",
        "x": [layer.kept for layer in layers],
        "marker": {"color": "--kept"},
        "hovertemplate": "layer %{customdata}: %{x:,} kept<extra></extra>",
    }
    removed = bar | {
        "name": "removed",
        "x": [layer.units - layer.kept for layer in layers],
        "marker": {"color": "--removed"},
        "text": [f"{layer.kept:,}" for layer in layers],
        "textposition": "none",
        "hovertemplate": "layer %{customdata}: %{x:,} removed<extra></extra>",
    }
    notes = [
        {
            "x": layer.units,
            "y": row,
            "text": f"{layer.kept:,}",
            "showarrow": False,
            "xanchor": "left",
            "xshift": 6,
            "font": {"color": "--ink", "size": 12},
        }
        for row, layer in zip(rows, layers, strict=True)
    ]
    shape = layout(
        barmode="stack",
        bargap=0.28,
        annotations=notes,
        xaxis={"title": {"text": what}, "tickformat": ",", "gridcolor": "--line", "zeroline": False},
        yaxis=_layer_axis(layers),
        margin={"l": _label_room(layers), "r": 52, "t": 8, "b": 48},
    )
    return Figure(name, title, caption, [kept, removed], shape, _rows_height(layers))


def score_distributions(view: View, prefix: str) -> list[Figure]:
    """Histograms of log10 score, kept against removed, for heads and neurons."""
    scores = view.record.get("scores") or {}
    if view.subnetwork is None:
        return []
    figures = []
    for what, masks in (("heads", view.subnetwork.heads), ("neurons", view.subnetwork.neurons)):
        values = np.array([v for block in scores.get(what) or () for v in block], dtype=float)
        kept = np.array([k for mask in masks for k in mask], dtype=bool)
        if len(values) and len(values) == len(kept):
            figures.append(_histogram(f"{prefix}-scores-{what}", what, values, kept))
    return figures


def histogram(
    values: np.ndarray, kept: np.ndarray, bins: int = SCORE_BINS
) -> tuple[list[float], list[int], list[int], int]:
    """Counts of log10 score.

    Args:
        values: scores of all units, shape (units,).
        kept: whether each is kept, shape (units,).
        bins: number of bins.

    Returns:
        Bin centres, counts of kept and of removed units, and how many scores have no logarithm (zero, negative, not
        finite).
    """
    positive = np.isfinite(values) & (values > 0)
    logs = np.log10(values[positive])
    if not len(logs):
        return [], [], [], len(values)
    low, high = float(logs.min()), float(logs.max())
    edges = np.linspace(low, high if high > low else low + 1e-3, bins + 1)
    counts = [np.histogram(logs[kept[positive] == flag], edges)[0].tolist() for flag in (True, False)]
    centres = ((edges[:-1] + edges[1:]) / 2).round(4).tolist()
    return centres, counts[0], counts[1], int((~positive).sum())


def _histogram(name: str, what: str, values: np.ndarray, kept: np.ndarray) -> Figure:
    centres, kept_counts, removed_counts, without = histogram(values, kept)
    traces: list[Trace] = [
        {
            "type": "bar",
            "name": label,
            "x": centres,
            "y": counts,
            "marker": {"color": colour, "line": {"width": 0}},
            "hovertemplate": f"10^%{{x:.2f}}: %{{y:,}} {label}<extra></extra>",
        }
        for label, counts, colour in (("kept", kept_counts, "--kept"), ("removed", removed_counts, "--removed-strong"))
    ]
    shape = layout(
        barmode="stack",
        bargap=0.06,
        showlegend=True,
        legend={"orientation": "h", "y": 1.02, "x": 1, "xanchor": "right", "yanchor": "bottom", "traceorder": "normal"},
        xaxis={"title": {"text": "log₁₀ score"}, "gridcolor": "--line", "zeroline": False},
        yaxis={"title": {"text": what}, "gridcolor": "--line", "zeroline": False},
        margin={"l": 58, "r": 12, "t": 34, "b": 48},
    )
    caption = f"Importance of all {len(values):,} {what}, before the cut."
    if without:
        caption += f" {without:,} with a score of zero or less {'is' if without == 1 else 'are'} not drawn."
    return Figure(name, f"Scores of {what}", caption, traces, shape, 300)


def _heat(values: list[list[Any]], layers: Sequence[Layer], columns: list[int]) -> Trace:
    return {
        "type": "heatmap",
        "z": values,
        "x": columns,
        "y": list(range(len(layers))),
        "zmin": 0,
        "zmax": 1,
        "colorscale": [[0, "--removed"], [1, "--kept"]],
        "showscale": False,
        "hoverongaps": False,
    }


def _layer_axis(layers: Sequence[Layer]) -> dict[str, Any]:
    """Layers from top to bottom, as the model computes them."""
    step = max(1, len(layers) // 24)
    rows = list(range(0, len(layers), step))
    numbered = all(layer.label.isdecimal() for layer in layers)
    return {
        "title": {"text": "layer"} if numbered else {"text": ""},
        "range": [len(layers) - 0.5, -0.5],
        "tickvals": rows,
        "ticktext": [escape(layers[row].label) for row in rows],
        "showgrid": False,
        "zeroline": False,
    }


def _ticks(count: int) -> dict[str, Any]:
    step = max(1, math.ceil(count / 12))
    return {"tickvals": list(range(0, count, step)), "tickangle": 0}


def _label_room(layers: Sequence[Layer]) -> int:
    longest = max((len(layer.label) for layer in layers), default=1)
    return 46 if longest <= 3 else min(220, 24 + 7 * longest)


def _rows_height(layers: Sequence[Layer]) -> int:
    return 72 + max(130, min(640, 30 * len(layers)))


def _sums(layers: Sequence[Layer]) -> tuple[int, int]:
    return sum(layer.kept for layer in layers), sum(layer.units for layer in layers)
