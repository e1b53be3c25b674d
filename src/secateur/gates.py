"""Gates: multiply heads and neurons by a differentiable mask while a context is open.

A gate is a forward-pre-hook on the input of a block's output projection, the one place where every unit's
contribution is
still separate, whatever the attention kernel. Leaving the context, also by an exception, removes every hook.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import Site, Sites, axis, output_weight, sites
from secateur.subnetwork import SubNetwork

T = TypeVar("T")


@contextmanager
def gates(
    model: nn.Module | Sites,
    heads: Sequence[Tensor | None] | None = None,
    neurons: Sequence[Tensor | None] | None = None,
) -> Iterator[None]:
    """Multiply each unit's contribution by its mask value within the context; nested gates multiply.

    Args:
        model: the model, or its resolved `Sites`.
        heads: for each attention block a mask, shape (units,), or (batch, units) for one mask per example; None = open.
        neurons: the same for each feed-forward block.

    Raises:
        SecateurError: the number of masks, or a mask's last dimension, does not fit the model.
    """
    found = model if isinstance(model, Sites) else sites(model)
    pairs = [*_pair(found.heads, heads, "heads"), *_pair(found.neurons, neurons, "neurons")]
    with ExitStack() as stack:
        for site, mask in pairs:
            handle = site.output.register_forward_pre_hook(_gate(mask, site.width))
            stack.callback(handle.remove)
        yield


@contextmanager
def only(model: nn.Module | Sites, sub: SubNetwork, *, views: bool = True) -> Iterator[None]:
    """Within the context the model is a sub-network of itself: as if it were sliced, empty blocks bypassed.

    Layers that lose both their blocks are not computed at all, where the family allows it. A block that keeps its first
    units computes with views of its weights, so that what is left out costs nothing; other masks are gates. Do not save
    or copy the model within the context: its parameters are not all in their places.

    Args:
        model: the model, or its resolved `Sites`.
        sub: what stays.
        views: False takes gates for all masks, as copies of the model on other devices need it.

    Raises:
        SecateurError: the sub-network does not fit the model.
    """
    found = model if isinstance(model, Sites) else sites(model)
    sub.check_fits(found)
    empty = sub.empty_blocks(found)
    masks: list[Tensor | None] = []
    with ExitStack() as stack:
        for site, mask in zip(found, (*sub.heads, *sub.neurons), strict=True):
            count = sum(mask)
            gated = 0 < count < len(mask)
            if views and gated and all(mask[:count]) and _can_narrow(found, site):
                stack.enter_context(_narrowed(site, count))
                gated = False
            masks.append(torch.tensor(mask, dtype=torch.float32) if gated else None)
        for site in [] if found.family.quirk else _gone(found, empty):
            stack.enter_context(_without(site.layers, site.layer_module))
        for site in empty:
            stack.callback(site.output.register_forward_hook(_nothing).remove)
            if site.norm is not None:
                stack.callback(site.norm.register_forward_hook(_as_it_came).remove)
        stack.enter_context(gates(found, masks[: len(found.heads)], masks[len(found.heads) :]))
        yield


@contextmanager
def prefixes(model: nn.Module | Sites, sub: SubNetwork) -> Iterator[Callable[[Callable[[], T]], list[T]]]:
    """Run a sub-network as `only` does, and each of its first layers as well, computing every layer once.

    Within the context `run(forward)` gives what `forward()` gives with the first layer alone, with the first two, and
    so on to all that are kept (`SubNetwork.prefixes`); what comes before and behind the layers is computed for each.

    Args:
        model: the model, or its resolved `Sites`.
        sub: what stays.

    Raises:
        SecateurError: the sub-network does not fit the model, or its layers cannot be run one by one.
    """
    found = model if isinstance(model, Sites) else sites(model)
    if not can_stop(found):
        raise SecateurError(f"The layers of a {found.family.name} model cannot be left out while it computes.")
    layers = found.heads[0].layers
    with only(found, sub):

        def run(forward: Callable[[], T]) -> list[T]:
            kept, outputs = list(layers.children()), []
            with ExitStack() as stack:
                for layer in kept:
                    handle = layer.register_forward_hook(lambda module, args, output: outputs.append(output))
                    stack.callback(handle.remove)
                whole = forward()
            results = []
            for layer, output in zip(kept[:-1], outputs, strict=False):
                with ExitStack() as stack:
                    for other in kept:
                        if other is not layer:
                            stack.enter_context(_without(layers, other))
                    stack.enter_context(_answering(layer, output))
                    results.append(forward())
            return [*results, whole]

        yield run


def can_stop(found: Sites) -> bool:
    """Whether a model can stop behind any of its layers: it has one list of them, and none asks for another."""
    return not found.family.quirk and len({s.stack for s in found}) == 1 and len(found.heads) == len(found.neurons)


@contextmanager
def _answering(module: nn.Module, output: object) -> Iterator[None]:
    """A module that gives what it gave before, without computing it."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: output
    try:
        yield
    finally:
        del module.__dict__["forward"]
        if own is not None:  # that of a hook or of a block without units
            module.forward = own


def _can_narrow(found: Sites, site: Site) -> bool:
    """Whether a block's first units are the first rows or columns of plain linear maps, and nothing counts heads."""
    plain = all(type(module) is nn.Linear and cut.parts == 1 for module, cut in site.cuts)
    return plain and not (site.kind == "heads" and found.family.quirk)


@contextmanager
def _narrowed(site: Site, count: int) -> Iterator[None]:
    """A block of its first units, by views of its weights through which gradients reach them."""
    width = site.width
    there = output_weight(site).shape[1] // width
    count = min(count, there)
    with ExitStack() as stack:
        for module, cut in site.cuts:
            for name, dimension in (("weight", axis(module, cut.side)), *([("bias", 0)] if cut.side == "out" else [])):
                if (whole := getattr(module, name)) is not None:  # which may be a view already
                    each = whole.shape[dimension] // there
                    part = whole.narrow(dimension, 0, count * each)
                    stack.enter_context(_instead(module, name, part))
        for attributes, value in ((site.block.counts, count), (site.block.widths, count * width)):
            for attribute in attributes:
                stack.callback(setattr, site.module, attribute, getattr(site.module, attribute))
                setattr(site.module, attribute, value)
        yield


@contextmanager
def _instead(module: nn.Module, name: str, value: Tensor) -> Iterator[None]:
    """A tensor in the place of a parameter, which keeps its place in the order of parameters."""
    usual, view = module._parameters[name], module.__dict__.get(name)
    module._parameters[name] = None
    module.__dict__[name] = value
    try:
        yield
    finally:
        if view is None:
            del module.__dict__[name]
        else:
            module.__dict__[name] = view
        module._parameters[name] = usual


def _gone(found: Sites, empty: list[Site]) -> list[Site]:
    """One site of each layer of which all blocks are empty; a list keeps one layer, since some encoders need one."""
    left = {site.layer_module for site in found if site not in empty}
    gone = [site for site in empty if site.kind == "neurons" and site.layer_module not in left]
    full = {site.stack for site in found} - {site.stack for site in found if site.layer_module in left}
    return [site for site in gone if not (site.stack in full and site.layer == 0)]


@contextmanager
def _without(layers: nn.Module, layer: nn.Module) -> Iterator[None]:
    """A list of layers without one of them."""
    usual = layers._modules
    layers._modules = {name: module for name, module in usual.items() if module is not layer}
    try:
        yield
    finally:
        layers._modules = usual


def _nothing(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return torch.zeros_like(output)


def _as_it_came(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
    return args[0]


def _pair(blocks: Sequence[Site], masks: Sequence[Tensor | None] | None, what: str) -> list[tuple[Site, Tensor]]:
    if masks is None:
        return []
    if len(masks) != len(blocks):
        raise SecateurError(f"{len(masks)} masks of {what} given, the model has {len(blocks)} blocks of them.")
    for site, mask in zip(blocks, masks, strict=True):
        if mask is not None and mask.shape[-1] != site.units:
            raise SecateurError(
                f"The mask for '{site.name}' has {mask.shape[-1]} entries, the block {site.units} {what}."
            )
    return [(site, mask) for site, mask in zip(blocks, masks, strict=True) if mask is not None]


def _gate(mask: Tensor, width: int):  # type: ignore[no-untyped-def]
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]  # (batch, ..., units × width)
        there = mask[..., : x.shape[-1] // width]  # a block of its first units has no more
        values = there.to(device=x.device, dtype=x.dtype).repeat_interleave(width, dim=-1)
        if values.dim() == 2:
            values = values.view(values.shape[0], *(1,) * (x.dim() - 2), values.shape[1])
        return (x * values, *args[1:])

    return hook
