"""A latency table: milliseconds of each block at each width, measured here, added up for any sub-network.

The table predicts, the timer judges. One layer of each distinct shape is cut to a few widths and timed alone; the whole
model is timed as it is and with every head and neuron removed, and the parts are stretched by one factor so that both
of these come out right (a layer timed alone finds its weights in the cache, the same layer in a model may not).
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from secateur.costs.analytic import evaluation
from secateur.costs.inputs import dummy_inputs, run
from secateur.costs.machine import machine_id
from secateur.costs.timers import Timing, pass_of, sample, summarise, time_interleaved, time_model
from secateur.edits.slice import Slice
from secateur.families import Site, Sites, UnitKind, sites
from secateur.paths import cache_dir
from secateur.subnetwork import SubNetwork

__all__ = ["Curve", "LatencyTable", "Timing", "latency_table", "time_interleaved", "time_model"]

VERSION = 1
"""Of the cached file: tables measured in another way are measured again."""

POINTS = 6
"""Steps between the widths at which a block is timed; between them latency is interpolated."""


@dataclass(frozen=True)
class Curve:
    """Milliseconds of a block by its number of units, never decreasing; linear between the measured widths.

    Attributes:
        widths: increasing, from 0 to all units.
        ms: time at each width; 0 at width 0.
    """

    widths: tuple[int, ...]
    ms: tuple[float, ...]

    def at(self, width: int) -> float:
        """Milliseconds at any width."""
        for low, high, start, end in zip(self.widths, self.widths[1:], self.ms, self.ms[1:], strict=False):
            if width <= high:
                return start + (end - start) * (width - low) / (high - low)
        return self.ms[-1]


@dataclass(frozen=True)
class LatencyTable:
    """Predicted milliseconds of a sub-network on this machine: fixed + Σ_b heads[b](width) + Σ_b neurons[b](width).

    Attributes:
        fixed: the model without any head or neuron (embeddings, norms, task head).
        heads: one curve per attention block, in the order of `families.sites`; equal shapes share a curve.
        neurons: one curve per feed-forward block.
        full: the timing of the whole model, which the prediction of the full sub-network equals.
    """

    fixed: float
    heads: tuple[Curve, ...]
    neurons: tuple[Curve, ...]
    full: Timing

    def of(self, sub: SubNetwork) -> float:
        """Predicted milliseconds of a sub-network."""
        curves, widths = (*self.heads, *self.neurons), (*sub.head_widths, *sub.neuron_widths)
        return self.fixed + sum(curve.at(width) for curve, width in zip(curves, widths, strict=True))

    def scaled(self, full: Timing) -> LatencyTable:
        """The same shapes under another timing of the whole model."""
        factor = full.median / self.full.median

        def scale(curves: tuple[Curve, ...]) -> tuple[Curve, ...]:
            return tuple(Curve(c.widths, tuple(factor * ms for ms in c.ms)) for c in curves)

        return LatencyTable(factor * self.fixed, scale(self.heads), scale(self.neurons), full)

    def block(self, kind: UnitKind, index: int, widths: Sequence[int]) -> list[float]:
        """Milliseconds of one block at each of the given widths, without the fixed part."""
        curve = (self.heads if kind == "heads" else self.neurons)[index]
        return [curve.at(width) for width in widths]


def latency_table(
    model: nn.Module, batch: int = 1, tokens: int = 128, *, seconds: float = 6.0, refresh: bool = False
) -> LatencyTable:
    """Measure a latency table, or read it from the cache if this machine measured the same shapes before.

    A cached table is scaled to a fresh timing of the whole model, since a machine is not equally busy every day.
    Budgets that are shares of the model do not notice.

    Args:
        model: a model of a known family; it is left as it was.
        batch: examples per pass.
        tokens: tokens per example.
        seconds: how long to measure; at least ten rounds are done.
        refresh: measure again even if a table is in the cache.
    """
    path = _cache_path(model, batch, tokens)
    found = None if refresh else _read(path)
    if found is not None:
        return found.scaled(time_model(model, batch, tokens, seconds=1.0))
    table = _measure(model, batch, tokens, seconds)
    _write(path, table)
    return table


def grid(kind: UnitKind, units: int) -> tuple[int, ...]:
    """Widths to time: 0, the smallest, and even steps to all; neurons at multiples of 64, where kernels run best."""
    step = 64 if kind == "neurons" and units > 64 else 1
    wanted = {step, *(step * round(units * i / POINTS / step) for i in range(1, POINTS)), units}
    return (0, *sorted(width for width in wanted if 0 < width <= units))


def monotone(values: Sequence[float]) -> list[float]:
    """The non-decreasing sequence nearest to `values` in squared error (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, weight = pools.pop()
            mean, count = (before * weight + mean * count) / (weight + count), weight + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def assemble(found: Sites, ms: dict[str, float], full: Timing) -> LatencyTable:
    """Join medians into a table.

    Args:
        found: the blocks.
        ms: times under equal conditions by name: "full" (the model), "bare" (the model without units), "layer <key>"
            (that layer without units, keys by `layer_key`), "block <key> <width>" (that layer with so many units of
            one block and none of the others, keys by `shape_key`).
        full: timing of the whole model, which the prediction of the full sub-network equals.
    """
    raw = {site.name: _rise(site, ms) for site in found}
    parts = sum(values[-1] for values in raw.values())
    prunable = max(0.0, 1 - ms["bare"] / ms["full"]) * full.median
    stretch = prunable / parts if parts > 0 else 0.0

    def curve(site: Site) -> Curve:
        return Curve(grid(site.kind, site.units), tuple(stretch * value for value in raw[site.name]))

    heads, neurons = tuple(map(curve, found.heads)), tuple(map(curve, found.neurons))
    total = sum(c.ms[-1] for c in (*heads, *neurons))
    return LatencyTable(full.median - total, heads, neurons, full)


def _rise(site: Site, ms: dict[str, float]) -> list[float]:
    """Milliseconds that each width of a block adds to its layer without units; never decreasing, 0 at width 0."""
    bare = ms[f"layer {layer_key(site)}"]
    added = [ms[f"block {shape_key(site)} {width}"] - bare for width in grid(site.kind, site.units)[1:]]
    return [0.0, *(max(0.0, value) for value in monotone(added))]


def _measure(model: nn.Module, batch: int, tokens: int, seconds: float) -> LatencyTable:
    found = sites(model)
    with evaluation(model), torch.inference_mode():
        calls = _layer_calls(model, found, batch, tokens)
        bare = _variant(model, found, {})
        runners: dict[str, Callable[[], object]] = {
            "full": pass_of(model, batch, tokens),
            "bare": pass_of(bare, batch, tokens),
        }
        for site in found:
            call = calls[site.layer_module]
            runners.setdefault(f"layer {layer_key(site)}", _replay(_layer_of(bare, site), *call))
            for width in grid(site.kind, site.units)[1:]:
                name = f"block {shape_key(site)} {width}"
                if name not in runners:
                    cut = _variant(model, found, {site.name: width})
                    runners[name] = _replay(_layer_of(cut, site), *call)
        samples = sample(runners, seconds, min_runs=10)
    # a low quantile: on a busy machine shapes differ by less than neighbours disturb
    ms = {name: sorted(values)[len(values) // 5] for name, values in samples.items()}
    return assemble(found, ms, summarise(samples["full"], model, batch, tokens))


def _layer_calls(
    model: nn.Module, found: Sites, batch: int, tokens: int
) -> dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]]:
    """The arguments that each layer gets in one forward pass."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def keep(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[layer] = (args, kwargs)

    with ExitStack() as stack:
        for layer in {site.layer_module for site in found}:
            stack.callback(layer.register_forward_pre_hook(keep, with_kwargs=True).remove)
        run(model, dummy_inputs(model, batch, tokens))
    return calls


def _variant(model: nn.Module, found: Sites, widths: dict[str, int]) -> nn.Module:
    """A copy of the model with so many units in the named blocks and none in the others; uncut tensors are shared."""

    def mask(site: Site) -> tuple[bool, ...]:
        kept = widths.get(site.name, 0)
        return tuple(i < kept for i in range(site.units))

    sub = SubNetwork(tuple(map(mask, found.heads)), tuple(map(mask, found.neurons)))
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    variant = copy.deepcopy(model, shared)
    Slice(sub).apply(variant)
    return variant


def _layer_of(model: nn.Module, site: Site) -> nn.Module:
    base = getattr(model, "base_model", model)
    layer: nn.Module = base.get_submodule(f"{site.stack}.{site.layer}")
    return layer


def _replay(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Callable[[], object]:
    if next(layer.parameters()).device.type != "cuda":
        return lambda: layer(*args, **kwargs)

    def synchronous() -> None:
        layer(*args, **kwargs)
        torch.cuda.synchronize()

    return synchronous


def layer_key(site: Site) -> str:
    """Equal for layers of the same class whose tensors have the same shapes."""
    shapes = [(name, tuple(p.shape)) for name, p in site.layer_module.named_parameters()]
    return f"{site.stack} {_digest([type(site.layer_module).__name__, shapes])}"


def shape_key(site: Site) -> str:
    """Equal for blocks at the same place of layers with equal `layer_key`."""
    return f"{layer_key(site)} {site.block.path} {site.kind}"


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()[:16]


def _cache_path(model: nn.Module, batch: int, tokens: int) -> Path:
    config: Any = model.config
    first = next(model.parameters())
    what = (
        type(model).__name__,
        [(site.name, shape_key(site)) for site in sites(model)],
        [tuple(p.shape) for p in model.parameters()],
        (getattr(config, "_attn_implementation", ""), str(first.dtype), str(first.device)),
        (batch, tokens, torch.get_num_threads(), torch.__version__, transformers.__version__, VERSION),
    )
    return cache_dir() / "latency" / machine_id() / f"{_digest(what)}.json"


def _read(path: Path) -> LatencyTable | None:
    """The cached table, or None if there is none that can be used."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        curves = [Curve(tuple(c["widths"]), tuple(map(float, c["ms"]))) for c in (*data["heads"], *data["neurons"])]
        heads = len(data["heads"])
        table = LatencyTable(float(data["fixed"]), tuple(curves[:heads]), tuple(curves[heads:]), Timing(**data["full"]))
    except (OSError, ValueError, TypeError, KeyError):
        return None
    numbers = [table.fixed, table.full.median, *(ms for c in curves for ms in c.ms)]
    sound = all(len(c.widths) == len(c.ms) and list(c.ms) == sorted(c.ms) for c in curves)
    return table if sound and all(math.isfinite(number) for number in numbers) and table.full.median > 0 else None


def _write(path: Path, table: LatencyTable) -> None:
    """Write through a temporary file, so that no reader ever sees half a table."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(asdict(table), file)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
