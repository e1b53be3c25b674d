"""Trajectory scores of every unit from a few backward passes: Gauss-Newton with random probes.

With all masks at one the trajectory terms and their gradients are zero, so first-order methods see nothing; but each
term is a squared residual, hence to second order score_j = ||J_j||² with J_j the derivative of the residuals with
respect to mask j. For a probe v ~ N(0, I) in residual space E[(Jᵀv)_j²] = ||J_j||²: one backward pass samples every
unit of every layer at once. Averaged over S probes the relative error of a score is about √(2/S).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from secateur.families import Sites, sites
from secateur.progress import track
from secateur.scores.observe import (
    Batch,
    Batches,
    Layer,
    Output,
    differentiable_inputs,
    examples_in,
    layers,
    quiet,
    read_output,
    recorded,
    sample,
    token_mask,
)
from secateur.scores.trajectory import TINY, TrajectoryScores, UnitGradients, gram_norm, unit_tokens
from secateur.subnetwork import UnitScores

EXACT_CLASSES = 4  # up to this many classes the output term is computed class by class, without chance


def probe_scores(
    model: nn.Module,
    batches: Batches,
    *,
    probes: int = 8,
    output_probes: int = 8,
    tokens: int = 768,
    temperature: float = 4.0,
    normalise: bool = True,
    own_layer: bool = False,
    keep_gradients: bool = False,
    bf16: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> TrajectoryScores:
    """Estimate the trajectory and the output term of every head and neuron, without labels.

    Args:
        model: a model of a known family.
        batches: model inputs; labels are ignored. Scores are means over batches.
        probes: random directions per batch for the trajectory term.
        output_probes: the same for the output term, where the classes are too many to be taken one by one.
        tokens: K, real tokens per batch, whole sequences (`observe.sample`).
        temperature: T of the output divergence.
        normalise: divide each layer's distance by ||G||_F² (the published sum form does not).
        own_layer: also count a unit's effect on the feature map of its own layer. Units of the last layer, which has no
            later one, always do.
        keep_gradients: return the samples too, for rearrangement without labels.
        bf16: run the network in bfloat16; derivatives, unlike differences, tolerate it.
        seed: of the token sample and of the probes.
        progress: show a progress line.
    """
    found = sites(model)
    sums: list[list[Tensor]] = []
    kept: list[tuple[list[Tensor], list[Tensor]]] = []
    with quiet(model):
        for index, batch in enumerate(track(batches, "scoring by probes", show=progress)):
            inputs = sample(model, batch, tokens, seed + index)
            generator = torch.Generator().manual_seed(_mixed(seed, index))
            run = _Run(model, found, inputs, own_layer, bf16)
            bent = run.trajectory(probes, normalise, generator)
            moved = run.output(output_probes, temperature, generator)
            sums.append([rows.square().sum(0) for rows in (*bent, *moved)])
            if keep_gradients:
                kept.append((bent, moved))
    means = [torch.stack(parts).mean(0) for parts in zip(*sums, strict=True)]
    units = len(means) // 2
    scores = TrajectoryScores(_split(means[:units], found), _split(means[units:], found))
    if keep_gradients:
        scores.trajectory_gradients = _stack([bent for bent, _ in kept], found)
        scores.output_gradients = _stack([moved for _, moved in kept], found)
    return scores


def gram_probe(features: Tensor, probe: Tensor, *, normalise: bool = True) -> Tensor:
    """Gradient with respect to the features of ⟨V, G⟩, G = A Aᵀ the Gram of the length-one tokens.

    Args:
        features: (tokens, hidden).
        probe: V, (tokens, tokens); only its symmetric part acts, since G is symmetric.
        normalise: divide by ||G||_F.

    Returns:
        (tokens, hidden): 2·sym(V)·A, projected to the tangent of the unit sphere, over the token's length.
    """
    length = features.norm(dim=-1, keepdim=True).clamp_min(TINY)
    unit = unit_tokens(features)
    slope = probe @ unit + probe.mT @ unit
    if normalise:
        slope = slope / gram_norm(unit)
    return (slope - unit * (slope * unit).sum(-1, keepdim=True)) / length


def softmax_rows(jacobian: Tensor, logits: Tensor, temperature: float) -> Tensor:
    """Square roots of the Gauss-Newton form of T²·KL: rows whose squares sum to ½ Jᵀ(diag p - ppᵀ)J.

    Args:
        jacobian: derivatives of the logits, (classes, ..., units).
        logits: (..., classes); p = softmax(logits/T).
        temperature: T.

    Returns:
        √(p_c/2)·(J_c - Σ_k p_k J_k), (classes, ..., units).
    """
    p = torch.softmax(logits.float() / temperature, -1).movedim(-1, 0)[..., None]
    return (p / 2).sqrt() * (jacobian - (p * jacobian).sum(0))


def softmax_probe(logits: Tensor, noise: Tensor, temperature: float) -> Tensor:
    """A random vector u with E[u uᵀ] = ½(diag p - ppᵀ), p = softmax(logits/T), from ε ~ N(0, I) of the logits' shape.

    u = (√p ∘ ε - p·(√pᵀε)) / √2, so that E[(Jᵀu)²] is the Gauss-Newton value of T²·KL.
    """
    p = torch.softmax(logits.float() / temperature, -1)
    root = p.sqrt()
    return (root * noise - p * (root * noise).sum(-1, keepdim=True)) / 2**0.5


class _Run:
    """One forward pass over a batch with every mask at one, and the backward passes through its graph.

    A mask multiplies the input x of a block's output projection, so its derivative is the sum of x ∘ ∂/∂x over the
    unit's
    positions: no mask has to be in the graph. Derivatives are kept per example, whose output depends on its own masks
    only: one backward pass yields an independent sample from every example.
    """

    def __init__(self, model: nn.Module, found: Sites, inputs: Batch, own_layer: bool, bf16: bool) -> None:
        device = next(iter(inputs.values())).device
        self.found = found
        self.blocks = list(found)
        self.examples = examples_in(inputs)
        self.layers = layers(found)
        # the first layer's map is seen by its own units only
        self.tapped = self.layers[0 if own_layer or len(self.layers) == 1 else 1 :]
        self.own_layer = own_layer
        autocast = torch.autocast(device.type, torch.bfloat16) if bf16 else nullcontext()
        with (
            differentiable_inputs([site.output for site in self.blocks]) as contributions,
            recorded([layer.tap for layer in self.tapped]) as seen,
            autocast,
        ):
            raw = model(**inputs)
        self.contributions = contributions
        self.features = [s for s in seen if s is not None]
        self.masks = [token_mask(inputs, t.stack, f) for t, f in zip(self.tapped, self.features, strict=True)]
        self.read: Output = read_output(raw, inputs, self.layers[-1].stack)

    def gradients(self, outputs: Sequence[Tensor], weights: Sequence[Tensor], blocks: Sequence[int]) -> list[Tensor]:
        """Σ over outputs of ⟨weights, ∂outputs/∂mask⟩ for each block: (examples, units), zero without influence."""
        present = {b: x for b in blocks if (x := self.contributions[b]) is not None}
        grads = torch.autograd.grad(
            list(outputs), list(present.values()), list(weights), retain_graph=True, allow_unused=True
        )
        by_block = dict(zip(present, grads, strict=True))
        return [self._mask_gradient(b, by_block.get(b)) for b in blocks]

    def _mask_gradient(self, block: int, grad: Tensor | None) -> Tensor:
        site, x = self.blocks[block], self.contributions[block]
        if x is None or grad is None:
            return torch.zeros(self.examples, site.units)
        products = (x.detach() * grad).flatten(1, -2).sum(1)
        products = products if products.dtype == torch.float64 else products.float()
        return products.unflatten(-1, (site.units, site.width)).sum(-1) if site.width > 1 else products

    def trajectory(self, probes: int, normalise: bool, generator: torch.Generator) -> list[Tensor]:
        """Samples of the trajectory term: per block (probes, units), squares summing to the score."""
        blocks = range(len(self.blocks))
        samples: list[list[Tensor]] = [[] for _ in blocks]
        for _ in range(probes):
            slopes = [_tap_probe(f, m, normalise, generator) for f, m in zip(self.features, self.masks, strict=True)]
            total = self.gradients(self.features, slopes, blocks)
            for tap, feature, slope in zip(self.tapped, self.features, slopes, strict=True):
                self._remove_own(tap, feature, slope, total)
            for rows, grad in zip(samples, total, strict=True):
                rows.append(grad.sum(0))
        return [torch.stack(rows) / probes**0.5 for rows in samples]

    def _remove_own(self, layer: Layer, feature: Tensor, slope: Tensor, total: list[Tensor]) -> None:
        """Take back what a layer's units did to its own feature map: a short backward pass through that layer alone."""
        if self.own_layer or layer.index == len(self.layers) - 1:
            return
        blocks = [*layer.heads, len(self.found.heads) + layer.neurons]
        for block, grad in zip(blocks, self.gradients([feature], [slope], blocks), strict=True):
            total[block] = total[block] - grad

    def output(self, probes: int, temperature: float, generator: torch.Generator) -> list[Tensor]:
        """Samples of the output term: per block (samples, units), squares summing to the score."""
        values, blocks = self.read.values, range(len(self.blocks))
        if values.shape[1] == 1 and values.shape[-1] <= EXACT_CLASSES:
            return self._output_by_class(values[:, 0], temperature)
        scale = (self.read.weights / probes).sqrt()[..., None]
        samples: list[list[Tensor]] = [[] for _ in blocks]
        for _ in range(probes):
            noise = torch.randn(values.shape, generator=generator).to(values.device)
            direction = softmax_probe(values.detach(), noise, temperature) if self.read.kind == "softmax" else noise
            grads = self.gradients([values], [(direction * scale).to(values)], blocks)
            for rows, grad in zip(samples, grads, strict=True):
                rows.append(grad)
        return [torch.cat(rows) for rows in samples]

    def _output_by_class(self, logits: Tensor, temperature: float) -> list[Tensor]:
        """Exact Gauss-Newton rows; a softmax sees only differences to the first class, which saves one pass."""
        weights = self.read.weights[:, 0].sqrt()[:, None]
        classes = range(logits.shape[1])
        if self.read.kind == "squared":
            jacobians = [self._derivatives(logits[:, c]) for c in classes]
            return [torch.cat([weights * j for j in per_class]) for per_class in zip(*jacobians, strict=True)]
        jacobians = [self._derivatives(logits[:, c] - logits[:, 0]) for c in classes[1:]]
        rows = []
        for block in range(len(self.blocks)):
            steps = torch.stack([j[block] for j in jacobians])
            jacobian = torch.cat((torch.zeros_like(steps[:1]), steps))
            rows.append((weights * softmax_rows(jacobian, logits.detach(), temperature)).flatten(0, 1))
        return rows

    def _derivatives(self, numbers: Tensor) -> list[Tensor]:
        return self.gradients([numbers], [torch.ones_like(numbers)], range(len(self.blocks)))


def _tap_probe(features: Tensor, mask: Tensor, normalise: bool, generator: torch.Generator) -> Tensor:
    """`gram_probe` at the real tokens of a feature map (examples, positions, hidden), zero at padding."""
    picked = features.detach()[mask]
    picked = picked if picked.dtype == torch.float64 else picked.float()
    noise = torch.randn(len(picked), len(picked), generator=generator).to(picked)
    slope = torch.zeros_like(features)
    slope[mask] = gram_probe(picked, noise, normalise=normalise).to(slope.dtype)
    return slope


def _mixed(seed: int, index: int) -> int:
    """A seed per batch, apart from the seeds of the token samples."""
    return (seed + 1) * 1_000_003 + index


def _split(values: list[Tensor], found: Sites) -> UnitScores:
    heads = len(found.heads)
    return UnitScores([v.detach().cpu() for v in values[:heads]], [v.detach().cpu() for v in values[heads:]])


def _stack(samples: list[list[Tensor]], found: Sites) -> UnitGradients:
    """Samples of several batches below each other, scaled so that squares sum to the mean over batches."""
    rows = [torch.cat(parts).cpu() / len(samples) ** 0.5 for parts in zip(*samples, strict=True)]
    heads = len(found.heads)
    return UnitGradients(rows[:heads], rows[heads:])
