"""Numbers as people read them: one unit per row, true minus signs, changes in the sense that matters."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

Sense = Literal["better", "worse", "same"]

MISSING = "–"
_FRACTIONS = ("accuracy", "f1")
_COUNT_UNITS = ((1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""))
_BYTE_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))
LEAST = {"speedup": (1.0, "×"), "sparsity": (0.01, "%")}
"""Kinds of budget that ask for at least so much, and the unit they are printed in."""
_NAMES = {
    "speedup": "Speed-up of MACs",
    "sparsity": "Sparsity of the layers' maps",
    "bits": "Bits of activations",
    "map_params": "Weights of the layers' maps",
    "macs": "MACs",
    "params": "Parameters",
    "encoder_params": "Encoder parameters",
    "bytes": "Size on disk",
    "size": "Size on disk",
    "latency": "Latency, median",
    "memory": "Peak memory",
    "latency_ms": "Latency, median",
}


def quantity_name(kind: str) -> str:
    """What a cost kind is called in print."""
    return _NAMES.get(kind, kind)


def unit_of(kind: str, values: Iterable[float | None]) -> tuple[float, str]:
    """The divisor and symbol that suit the largest of some values of one kind of cost."""
    if kind.startswith("latency"):
        return 1.0, "ms"
    largest = max((abs(value) for value in values if _finite(value)), default=0.0)  # type: ignore[arg-type]
    units = _BYTE_UNITS if kind in ("bytes", "size", "memory") else _COUNT_UNITS
    return next((unit for unit in units if largest >= unit[0]), units[-1])


def amount(value: float | None, unit: tuple[float, str]) -> str:
    """A value in a unit, with three or four significant digits."""
    if not _finite(value):
        return MISSING
    scaled = float(value) / unit[0]  # type: ignore[arg-type]
    digits = 0 if unit[0] == 1.0 and unit[1] in ("", "B") else 1 if abs(scaled) >= 100 else 2
    return minus(f"{scaled:,.{digits}f}") + (f" {unit[1]}" if unit[1] else "")


def is_fraction(metric: str) -> bool:
    """Whether a metric is shown in per cent (accuracy, F1) or as a plain number (correlations)."""
    return metric.lower().startswith(_FRACTIONS)


def metric_text(metric: str, value: float | None) -> str:
    """A metric's value, "89.79 %" or "0.8630"."""
    if not _finite(value):
        return MISSING
    return f"{100 * value:.2f} %" if is_fraction(metric) else minus(f"{value:.4f}")  # type: ignore[operator]


def metric_change(metric: str, before: float | None, after: float | None) -> str:
    """Difference of a metric, in points of per cent or as a plain number."""
    if not (_finite(before) and _finite(after)):
        return MISSING
    difference = after - before  # type: ignore[operator]
    return minus(f"{100 * difference:+.2f} points" if is_fraction(metric) else f"{difference:+.4f}")


def metric_sense(before: float | None, after: float | None) -> Sense:
    """Whether a metric, of which more is better, went up or down."""
    if not (_finite(before) and _finite(after)) or abs(after - before) < 5e-5:  # type: ignore[operator]
        return "same"
    return "better" if after > before else "worse"  # type: ignore[operator]


def share_change(before: float | None, after: float | None) -> str:
    """Relative change of a cost, "−40.0 %"."""
    if not (_finite(before) and _finite(after)) or not before:
        return MISSING
    percent = 100 * (after / before - 1)  # type: ignore[operator]
    return "0.0 %" if abs(percent) < 0.05 else minus(f"{percent:+.1f} %")


def cost_sense(before: float | None, after: float | None) -> Sense:
    """Whether a cost, of which less is better, went down or up by at least half a per cent."""
    if not (_finite(before) and _finite(after)) or not before or abs(after / before - 1) < 0.005:  # type: ignore[operator]
        return "same"
    return "better" if after < before else "worse"  # type: ignore[operator]


def speed(before: float | None, after: float | None) -> str:
    """Ratio of two latencies in words, "1.52× faster"."""
    if not (_finite(before) and _finite(after)) or not before or not after:
        return MISSING
    ratio = before / after
    if 0.995 < ratio < 1.005:
        return "same speed"
    return f"{ratio:.2f}× faster" if ratio > 1 else f"{1 / ratio:.2f}× slower"


def seconds_text(seconds: float) -> str:
    """A duration, "3.4 s", "2 min 05 s" or "1 h 07 min"."""
    if seconds < 60:
        return f"{seconds:.1f} s" if seconds >= 0.1 else f"{1000 * seconds:.0f} ms"
    if seconds < 3600:
        return f"{int(seconds // 60)} min {int(seconds % 60):02d} s"
    return f"{int(seconds // 3600)} h {int(seconds % 3600 // 60):02d} min"


def minus(text: str) -> str:
    """A true minus sign for a hyphen in front of digits."""
    return text.replace("-", "−")


def _finite(value: float | None) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
