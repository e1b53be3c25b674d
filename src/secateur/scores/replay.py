"""Run a model from the middle: modules that are not to be computed again answer with what they returned before.

The model's own forward pass glues the layers together (masks, position biases, heads), so that replaying needs no
knowledge of the architecture: only the forward of chosen modules is replaced while a context is open.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from secateur.families import Cut, Site


@contextmanager
def replaced(forwards: dict[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the forward of modules; hooks on them still fire. Leaving the context restores every one."""
    with ExitStack() as stack:
        for module, forward in forwards.items():
            stack.callback(_restore, module, module.__dict__.get("forward"))
            module.__dict__["forward"] = forward
        yield


def _restore(module: nn.Module, before: Any) -> None:
    if before is None:
        module.__dict__.pop("forward", None)
    else:
        module.__dict__["forward"] = before


def answer(value: Any) -> Callable[..., Any]:
    """A forward that returns `value`, whatever it is given."""
    return lambda *args, **kwargs: value


@contextmanager
def recorded_returns(modules: Sequence[nn.Module]) -> Iterator[dict[nn.Module, Any]]:
    """Collect what each module returned in the latest forward pass, as it is (tensor or tuple)."""
    seen: dict[nn.Module, Any] = {}

    def hook(module: nn.Module, args: Any, output: Any) -> None:
        seen[module] = output

    handles = [module.register_forward_hook(hook) for module in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def tiled(value: Any, copies: int, examples: int) -> Any:
    """Repeat every tensor with one row per example `copies` times along its first axis, inside tuples and lists too."""
    if isinstance(value, Tensor):
        if value.dim() == 0 or value.shape[0] != examples:
            return value
        return value.expand(copies, *value.shape).flatten(0, 1) if value.dim() else value
    if isinstance(value, tuple | list):
        return type(value)(tiled(v, copies, examples) for v in value)
    return value


def with_first(value: Any, tensor: Tensor) -> Any:
    """The same return value with its main tensor replaced."""
    return tensor if isinstance(value, Tensor) else (tensor, *value[1:])


def holds_projection(site: Site) -> bool:
    """Whether the block's module applies the output projection itself (BERT's attention leaves it to a sibling)."""
    return any(module is site.output for module in site.module.modules())


def inner_maps(site: Site) -> list[tuple[nn.Module, Cut]]:
    """The maps that produce a block's units: every cut but the output projection."""
    return [(module, cut) for module, cut in site.cuts if cut.side == "out"]
