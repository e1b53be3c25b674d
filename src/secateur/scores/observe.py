"""What scoring sees of a model: its layers and feature taps, the sampled tokens, its outputs; by hooks alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from secateur.families import Sites, sites
from secateur.scores.trajectory import kl_divergence, squared_difference

Batch = dict[str, Tensor]
Batches = Sequence[Batch]

LABELS = ("labels", "label", "label_ids", "start_positions", "end_positions", "next_sentence_label")
CLOSED = -1e4  # logit of a padding position where the classes are positions (question answering)


@dataclass(frozen=True)
class Layer:
    """One layer in forward order over all stacks.

    Attributes:
        index: position over all stacks (the decoder follows the encoder).
        stack: path of its stack.
        module: the whole layer.
        heads: positions of its attention blocks in `Sites.heads`.
        neurons: position of its feed-forward block in `Sites.neurons`.
        tap: module whose output is the layer's feature map: the down-projection (bias included, before the residual
            sum) if LayerNorm follows the sum, else the layer itself, whose output is the residual stream.
    """

    index: int
    stack: str
    module: nn.Module
    heads: tuple[int, ...]
    neurons: int
    tap: nn.Module


def layers(found: Sites) -> list[Layer]:
    """The layers of a model, encoder before decoder."""
    result = []
    for index, site in enumerate(found.neurons):
        heads = tuple(i for i, h in enumerate(found.heads) if (h.stack, h.layer) == (site.stack, site.layer))
        tap = site.output if found.family.norm == "post" else site.layer_module
        result.append(Layer(index, site.stack, site.layer_module, heads, index, tap))
    return result


def first_tensor(output: Any) -> Tensor:
    """A module's main output: itself, or the first entry of a tuple."""
    return output if isinstance(output, Tensor) else output[0]


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, frozen parameters, no key-value cache; everything is put back afterwards."""
    training = [m for m in model.modules() if m.training]
    thawed = [p for p in model.parameters() if p.requires_grad]
    config: Any = getattr(model, "config", None)
    cached = getattr(config, "use_cache", None)
    model.eval()
    for parameter in thawed:
        parameter.requires_grad_(False)
    if cached:
        config.use_cache = False
    try:
        yield
    finally:
        if cached:
            config.use_cache = cached
        for parameter in thawed:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True


@contextmanager
def recorded(taps: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
    """Collect the main output of each module during forward passes: the list holds the latest one."""
    seen: list[Tensor | None] = [None] * len(taps)

    def keeper(index: int) -> Any:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            seen[index] = first_tensor(output)

        return hook

    handles = [module.register_forward_hook(keeper(i)) for i, module in enumerate(taps)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def recorded_inputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
    """Collect the first positional input of each module during forward passes: the list holds the latest one."""
    seen: list[Tensor | None] = [None] * len(modules)

    def keeper(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[index] = args[0]

        return hook

    handles = [module.register_forward_pre_hook(keeper(i)) for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def differentiable_inputs(modules: Sequence[nn.Module]) -> Iterator[list[Tensor | None]]:
    """Like `recorded_inputs`, and each input is part of the graph, so that it can be differentiated by."""
    seen: list[Tensor | None] = [None] * len(modules)

    def keeper(index: int) -> Any:
        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0] if args[0].requires_grad else args[0].detach().requires_grad_(True)
            seen[index] = x
            return (x, *args[1:])

        return hook

    handles = [module.register_forward_pre_hook(keeper(i)) for i, module in enumerate(modules)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def inputs_of(model: nn.Module, batch: Batch) -> Batch:
    """The batch without labels, on the model's device."""
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in batch.items() if name not in LABELS}


def examples_in(batch: Batch) -> int:
    """Number of examples of a batch."""
    return len(next(iter(batch.values())))


def sample(model: nn.Module, batch: Batch, tokens: int, seed: int) -> Batch:
    """Whole examples with at most `tokens` real tokens together (at least one example), drawn with a seed.

    Whole sequences cost what their own tokens cost, while scattered tokens would drag all of theirs through the
    network. Trailing columns that hold only padding are dropped.

    Args:
        model: needed only to learn how many tokens an image has.
        batch: model inputs; labels are dropped.
        tokens: K, upper limit of real tokens in the sample.
        seed: of the order in which examples are taken.
    """
    inputs = inputs_of(model, batch)
    count = examples_in(inputs)
    mask = inputs.get("attention_mask")
    if mask is not None and mask.dim() == 2:
        lengths = mask.sum(1)
    elif "input_ids" in inputs:
        lengths = torch.full((count,), inputs["input_ids"].shape[1])
    else:
        lengths = torch.full((count,), _tokens_of_an_image(model, inputs))
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    fits = int((lengths.cpu()[order].cumsum(0) <= tokens).sum())
    chosen = order[: max(fits, 1)].sort().values
    picked = {name: value[chosen.to(value.device)] for name, value in inputs.items()}
    return _trim(_trim(picked, "attention_mask"), "decoder_attention_mask")


def _tokens_of_an_image(model: nn.Module, inputs: Batch) -> int:
    tap = layers(sites(model))[0].module
    with torch.no_grad(), quiet(model), recorded([tap]) as seen:
        model(**{name: value[:1] for name, value in inputs.items()})
    return 1 if seen[0] is None else seen[0].shape[1]


def _trim(inputs: Batch, key: str) -> Batch:
    mask = inputs.get(key)
    if mask is None or mask.dim() != 2 or not bool(mask.any()):
        return inputs
    end = int(mask.any(0).nonzero().max()) + 1
    prefix = "decoder_" if key.startswith("decoder_") else ""
    names = {prefix + name for name in ("input_ids", "attention_mask", "token_type_ids", "position_ids")}
    return {n: v[:, :end] if n in names and v.shape == mask.shape else v for n, v in inputs.items()}


def token_mask(inputs: Batch, stack: str, features: Tensor) -> Tensor:
    """Which positions of a feature map (examples, positions, hidden) hold real tokens, as bool (examples, positions).

    A decoder reads `decoder_attention_mask`; without it and without `decoder_input_ids` its inputs are the shifted
    encoder inputs, so that the encoder's mask fits. Where no mask fits, every position counts.
    """
    keys = ["decoder_attention_mask"] if stack.startswith("decoder") else ["attention_mask"]
    if stack.startswith("decoder") and "decoder_input_ids" not in inputs:
        keys.append("attention_mask")
    for key in keys:
        mask = inputs.get(key)
        if mask is not None and mask.shape == features.shape[:2]:
            return mask.bool()
    return torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)


@dataclass(frozen=True)
class Output:
    """A model's output as rows of numbers.

    Attributes:
        values: (examples, rows, numbers); one row for a sentence, one per token for token labels, two for a span.
        weights: (examples, rows), 0 for padding, summing to one.
        kind: how two outputs are compared: `"softmax"` by Kullback-Leibler divergence, `"squared"` by squared
            difference.
    """

    values: Tensor
    weights: Tensor
    kind: Literal["softmax", "squared"]


def read_output(output: Any, inputs: Batch, stack: str) -> Output:
    """Read a transformers output; `stack` is the model's last stack, whose tokens a token-level output belongs to.

    Logits are compared by their softmax, a single logit (regression) by its square. A model without a task head is
    compared by its last hidden state.
    """
    logits = getattr(output, "logits", None)
    if logits is None and getattr(output, "start_logits", None) is not None:
        spans = torch.stack((output.start_logits, output.end_logits), 1)
        spans = spans.masked_fill(~token_mask(inputs, stack, spans[:, 0])[:, None], CLOSED)
        return Output(spans, _weights(torch.ones_like(spans[..., 0])), "softmax")
    values = logits if logits is not None else output.last_hidden_state
    kind: Literal["softmax", "squared"] = "squared" if logits is None or values.shape[-1] == 1 else "softmax"
    if values.dim() == 2:
        values = values[:, None]
        return Output(values, _weights(torch.ones_like(values[..., 0])), kind)
    flat = values.flatten(1, -2)
    return Output(flat, _weights(token_mask(inputs, stack, flat).to(flat.dtype)), kind)


def _weights(mask: Tensor) -> Tensor:
    mask = mask.detach().float()
    return mask / mask.sum().clamp_min(1)


def output_divergence(teacher: Output, student: Tensor, temperature: float) -> Tensor:
    """Weighted mean of the rows' divergence: `student` (variants, examples, rows, numbers) → (variants,), float64."""
    if teacher.kind == "softmax":
        rows = kl_divergence(teacher.values, student, temperature)
    else:
        rows = squared_difference(teacher.values, student)
    return (rows * teacher.weights.double()).sum((-1, -2))
