"""Gates: multiply heads and neurons by a differentiable mask while a context is open.

A gate is a forward-pre-hook on the input of a block's output projection, the one place where every unit's
contribution is
still separate, whatever the attention kernel. Leaving the context, also by an exception, removes every hook.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

from torch import Tensor, nn

from secateur.errors import SecateurError
from secateur.families import Site, Sites, sites


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
        values = mask.to(device=x.device, dtype=x.dtype).repeat_interleave(width, dim=-1)
        if values.dim() == 2:
            values = values.view(values.shape[0], *(1,) * (x.dim() - 2), values.shape[1])
        return (x * values, *args[1:])

    return hook
