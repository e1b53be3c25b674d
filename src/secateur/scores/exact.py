"""Trajectory scores by really masking every unit, one at a time: the reference, and the refinement near a cut.

Nothing before the masked unit is computed again (`replay`): layers up to its own answer from memory, its own block
changes by a product of its activation and its columns of the output projection, and several masked variants run as
one batch.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from secateur.errors import UnsupportedModel
from secateur.families import Site, Sites, output_weight, sites
from secateur.progress import Advance
from secateur.progress import progress as shown
from secateur.scores.observe import (
    Batch,
    Batches,
    Layer,
    Output,
    examples_in,
    layers,
    output_divergence,
    quiet,
    read_output,
    recorded,
    recorded_inputs,
    sample,
    token_mask,
)
from secateur.scores.replay import answer, holds_projection, inner_maps, recorded_returns, replaced, tiled, with_first
from secateur.scores.trajectory import TrajectoryScores, gram_change, gram_norm, unit_tokens
from secateur.subnetwork import SubNetwork, UnitScores

VARIANT_TOKENS = 4096  # tokens per batch of variants: enough to keep the matrix products busy, little enough for caches


def exact_scores(
    model: nn.Module,
    batches: Batches,
    *,
    tokens: int = 768,
    temperature: float = 4.0,
    normalise: bool = True,
    own_layer: bool = False,
    seed: int = 0,
    units: SubNetwork | None = None,
    variants: int | None = None,
    progress: bool = False,
) -> TrajectoryScores:
    """Mask each unit, run the rest of the network, compare with the intact one. Labels are ignored.

    Args:
        model: a model of a known family; one in half precision is scored as a float32 copy, since the method subtracts
            nearly equal numbers.
        batches: model inputs. Scores are means over batches.
        tokens: K, real tokens per batch, whole sequences (the same sample as `probe_scores` with the same seed).
        temperature: T of the output divergence.
        normalise: divide each layer's distance by ||G||_F² (the published sum form does not).
        own_layer: also count a unit's effect on the feature map of its own layer; the last layer's units always do.
        seed: of the token sample.
        units: score only the units that are True here; the others are NaN.
        variants: masked copies per forward pass; by default as many as hold about 4,096 tokens.
        progress: show a progress line.
    """
    if next(model.parameters()).dtype not in (torch.float32, torch.float64):
        model = nn.Module.float(copy.deepcopy(model))  # transformers refuses its own `float` here
    found = sites(model)
    wanted = _wanted(found, units)
    total = sum(len(w) for w in wanted) * len(batches)
    sums: list[tuple[list[Tensor], list[Tensor]]] = []
    with torch.inference_mode(), quiet(model), shown("exact scoring", total, show=progress) as advance:
        for index, batch in enumerate(batches):
            inputs = sample(model, batch, tokens, seed + index)
            run = _Run(model, found, inputs, temperature, normalise, own_layer)
            sums.append(run.scores(wanted, variants, advance, index * (total // max(len(batches), 1))))
    bent = [torch.stack(parts).mean(0) for parts in zip(*(b for b, _ in sums), strict=True)]
    moved = [torch.stack(parts).mean(0) for parts in zip(*(m for _, m in sums), strict=True)]
    heads = len(found.heads)
    return TrajectoryScores(UnitScores(bent[:heads], bent[heads:]), UnitScores(moved[:heads], moved[heads:]))


def _wanted(found: Sites, units: SubNetwork | None) -> list[list[int]]:
    if units is None:
        return [list(range(site.units)) for site in found]
    units.check_fits(found)
    return [[i for i, keep in enumerate(mask) if keep] for mask in (*units.heads, *units.neurons)]


@dataclass(frozen=True)
class _Tap:
    """A feature map of the intact network: its unit tokens (tokens, hidden), ||G||_F², and which positions they are."""

    unit: Tensor
    norm: float
    mask: Tensor


class _Run:
    """One batch: the intact pass with everything that later passes reuse, and the masked passes."""

    def __init__(
        self, model: nn.Module, found: Sites, inputs: Batch, temperature: float, normalise: bool, own_layer: bool
    ) -> None:
        self.model, self.inputs, self.temperature, self.own_layer = model, inputs, temperature, own_layer
        self.found = found
        self.blocks = list(found)
        self.layers = layers(found)
        self.examples = examples_in(inputs)
        reused = [layer.module for layer in self.layers]
        for site in self.blocks:
            reused += [site.output] if site.kind == "neurons" else [site.output, site.module]
        with (
            recorded_returns(reused) as returns,
            recorded_inputs([site.output for site in self.blocks]) as contributions,
            recorded([layer.tap for layer in self.layers]) as features,
        ):
            raw = model(**inputs)
        self.returns = returns
        self.contributions = contributions
        self.taps = [self._tap(layer, f, normalise) for layer, f in zip(self.layers, features, strict=True)]
        self.read: Output = read_output(raw, inputs, self.layers[-1].stack)
        self.positions = sum(f.shape[0] * f.shape[1] for f in features[-1:] if f is not None)

    def _tap(self, layer: Layer, features: Tensor | None, normalise: bool) -> _Tap:
        features = _ran(features, layer.module)
        mask = token_mask(self.inputs, layer.stack, features)
        unit = unit_tokens(features[mask])
        return _Tap(unit, float(gram_norm(unit)) ** 2 if normalise else 1.0, mask)

    def scores(
        self, wanted: list[list[int]], variants: int | None, advance: Advance, done: int
    ) -> tuple[list[Tensor], list[Tensor]]:
        """(trajectory, output) per block; NaN where a unit is not wanted."""
        size = variants or max(1, math.ceil(VARIANT_TOKENS / max(self.positions, 1)))
        bent = [torch.full((site.units,), math.nan, dtype=torch.float64) for site in self.blocks]
        moved = [b.clone() for b in bent]
        for layer in self.layers:
            for block in (*layer.heads, len(self.found.heads) + layer.neurons):
                for start in range(0, len(wanted[block]), size):
                    chosen = wanted[block][start : start + size]
                    bent[block][chosen], moved[block][chosen] = self.masked(layer, block, chosen)
                    done += len(chosen)
                    advance(done, self.blocks[block].name)
        return bent, moved

    def masked(self, layer: Layer, block: int, units: list[int]) -> tuple[Tensor, Tensor]:
        """Both terms for the units of one block, each masked alone, in one forward pass."""
        copies = len(units)
        last = layer.index == len(self.layers) - 1
        seen_layers = self.layers[layer.index if self.own_layer or last else layer.index + 1 :]
        batch = {name: tiled(value, copies, self.examples) for name, value in self.inputs.items()}
        with (
            replaced(self._memory(layer, block, units)),
            recorded([seen.tap for seen in seen_layers]) as features,
        ):
            raw = self.model(**batch)
        bent = torch.zeros(copies, dtype=torch.float64)
        for seen, feature in zip(seen_layers, features, strict=True):
            tap = self.taps[seen.index]
            student = _ran(feature, seen.module).unflatten(0, (copies, self.examples))[:, tap.mask]
            bent += gram_change(tap.unit, unit_tokens(student)).double().cpu() / tap.norm
        values = read_output(raw, batch, self.layers[-1].stack).values.unflatten(0, (copies, self.examples))
        return bent, output_divergence(self.read, values, self.temperature).cpu()

    def _memory(self, layer: Layer, block: int, units: list[int]) -> dict[nn.Module, Callable[..., Any]]:
        """Forwards for everything that is not to be computed again."""
        copies = len(units)
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        # within a stack only what the last of the earlier layers returns is used
        last = {earlier.stack: earlier.module for earlier in self.layers[: layer.index]}
        returned = {stack: self._tiled(module, copies) for stack, module in last.items()}
        for earlier in self.layers[: layer.index]:
            forwards[earlier.module] = answer(returned[earlier.stack])
        for before in self._blocks_before(layer, block):
            site = self.blocks[before]
            forwards[site.module] = answer(self._tiled(site.module, copies))
            if not holds_projection(site):
                forwards[site.output] = answer(self._tiled(site.output, copies))
        site = self.blocks[block]
        changed = self._without(block, units)
        if site.kind == "neurons":
            forwards[site.output] = answer(changed)
            for module, _ in inner_maps(site):
                forwards[module] = _nothing
        elif holds_projection(site):
            forwards[site.module] = answer(with_first(self._tiled(site.module, copies), changed))
        else:
            forwards[site.module] = answer(self._tiled(site.module, copies))
            forwards[site.output] = answer(changed)
        return forwards

    def _blocks_before(self, layer: Layer, block: int) -> Iterator[int]:
        for head in layer.heads:
            if head == block:
                return
            yield head

    def _tiled(self, module: nn.Module, copies: int) -> Any:
        return tiled(self.returns[module], copies, self.examples)

    def _without(self, block: int, units: list[int]) -> Tensor:
        """The block's output projection without each unit: f - c_u W_uᵀ, (variants × examples, positions, hidden)."""
        site: Site = self.blocks[block]
        before = self.returns[site.output]
        contribution = _ran(self.contributions[block], site.module)
        part = contribution.unflatten(-1, (site.units, site.width))[..., units, :]
        weight = output_weight(site).unflatten(-1, (site.units, site.width))[:, units]
        removed = torch.einsum("...uw,huw->u...h", part, weight)
        return (before - removed).flatten(0, 1)


def _ran(tensor: Tensor | None, module: nn.Module) -> Tensor:
    if tensor is None:
        raise UnsupportedModel(f"{type(module).__name__} did not run: turn off layer dropping to score its units.")
    return tensor


def _nothing(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """Stands for a map whose outputs are not needed: an empty last axis costs nothing downstream."""
    return x.new_empty((*x.shape[:-1], 0))
