"""Teacher and student side by side, one block at a time: what a block gets, and what it should put out.

The student's layers are changed while it is run, so each layer is run again from the stored output of the one before it
(`replay`); the teacher runs each layer once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from secateur.families import Site, Sites, sites
from secateur.scores.observe import (
    Batch,
    Batches,
    Layer,
    first_tensor,
    inputs_of,
    layers,
    recorded,
    recorded_inputs,
    token_mask,
)
from secateur.scores.replay import answer, inner_maps, recorded_returns, replaced, with_first


class _Reached(Exception):
    pass


class BlockRuns:
    """Runs a teacher and a student of the same shape through the same batches, layer by layer.

    Attributes:
        student: the student's sites.
    """

    def __init__(self, teacher: nn.Module, student: nn.Module, batches: Batches, read_rows: bool) -> None:
        self.teacher, self.student = sites(teacher), sites(student)
        self._models = (teacher, student)
        self._layers = (layers(self.teacher), layers(self.student))
        self._batches = [inputs_of(teacher, batch) for batch in batches]
        self._read_rows = read_rows
        self._stored: tuple[list[dict[str, Any]], list[dict[str, Any]]] = ([{} for _ in batches], [{} for _ in batches])
        self._targets: list[dict[str, Tensor]] = []
        self._rows: list[Tensor] = []
        self._plain_sum = False

    def enter(self, layer: Layer) -> None:
        """Run the teacher through a layer and keep its targets."""
        self._targets, self._rows = [], []
        last = layer.index == len(self._layers[0]) - 1
        for index, inputs in enumerate(self._batches):
            targets, mask, returned = self._teach(layer, index, inputs)
            if last and self._read_rows:
                read = rows_read(self._models[0], self._layers[0][-1].module, inputs)
                mask = mask & read if read.shape == mask.shape and bool((mask & read).any()) else mask
            self._targets.append(targets)
            self._rows.append(mask)
            self._stored[0][index][layer.stack] = returned

    def leave(self, layer: Layer) -> None:
        """Store what the student's layer returns, now that it has been changed."""
        if layer.index == len(self._layers[1]) - 1:
            return
        module = self._layers[1][layer.index].module
        for index, inputs in enumerate(self._batches):
            with recorded_returns([module]) as returns, self._from(1, layer, index), _stop_after(module):
                _run(self._models[1], inputs)
            self._stored[1][index][layer.stack] = returns[module]

    def rows(self, layer: Layer, site: Site) -> Iterator[tuple[Tensor, Tensor]]:
        """For each batch z, the inputs of the student's output projection, and y, what it should put out.

        Both at the real tokens: (tokens, units × width) and (tokens, hidden).
        """
        mine = self._layers[1][layer.index]
        before = _blocks_before(self.student, mine, site)
        for index, inputs in enumerate(self._batches):
            with (
                recorded_inputs([site.output, inner_maps(site)[0][0]]) as seen,
                recorded([b.output for b in before]) as outputs,
                _layer_input(mine.module) as entered,
                self._from(1, layer, index),
                _stop_before(site.output),
            ):
                _run(self._models[1], inputs)
            z, own = seen
            if z is None:
                continue
            rows = self._rows[index]
            y = self._targets[index][site.name]
            residual = own if self.student.family.norm == "post" else _stream(entered, outputs, self._plain_sum)
            if residual is not None:
                y = y - residual
            yield z[rows], y[rows]

    def _teach(self, layer: Layer, index: int, inputs: Batch) -> tuple[dict[str, Tensor], Tensor, Any]:
        """Targets by block name (block output + residual input), the real tokens, and what the layer returned."""
        blocks = [*(self.teacher.heads[h] for h in layer.heads), self.teacher.neurons[layer.neurons]]
        module = self._layers[0][layer.index].module
        with (
            recorded_inputs([inner_maps(b)[0][0] for b in blocks]) as own,
            recorded([b.output for b in blocks]) as outputs,
            recorded_returns([module]) as returns,
            _layer_input(module) as entered,
            self._from(0, layer, index),
            _stop_after(module),
        ):
            _run(self._models[0], inputs)
        returned = returns[module]
        post = self.teacher.family.norm == "post"
        if index == 0 and not post:
            whole = _stream(entered, outputs, True)
            self._plain_sum = whole is not None and torch.allclose(whole, first_tensor(returned), rtol=1e-3, atol=1e-4)
        targets = {}
        for i, block in enumerate(blocks):
            output = outputs[i]
            if output is None:
                continue
            residual = own[i] if post else _stream(entered, outputs[:i], self._plain_sum)
            targets[block.name] = output if residual is None else output + residual
        mask = token_mask(inputs, layer.stack, first_tensor(returned))
        return targets, mask, returned

    @contextmanager
    def _from(self, who: int, layer: Layer, index: int) -> Iterator[None]:
        """Earlier layers answer with the stored output of the last one before `layer` in their stack."""
        forwards: dict[nn.Module, Callable[..., Any]] = {}
        for earlier in self._layers[who][: layer.index]:
            forwards[earlier.module] = answer(self._stored[who][index][earlier.stack])
        with replaced(forwards):
            yield


def rows_read(model: nn.Module, layer: nn.Module, inputs: Batch) -> Tensor:
    """Which positions of a layer's output the model's output depends on: (examples, positions), by differentiation."""
    leaf: list[Tensor] = []

    def cut(module: nn.Module, args: Any, output: Any) -> Any:
        leaf.append(first_tensor(output).detach().requires_grad_(True))
        return with_first(output, leaf[0])

    handle = layer.register_forward_hook(cut)
    try:
        with torch.enable_grad():
            raw = model(**inputs)
            numbers = raw.logits if getattr(raw, "logits", None) is not None else first_tensor(tuple(raw.values()))
            weights = torch.randn(numbers.shape, generator=torch.Generator().manual_seed(0)).to(numbers)
            (grad,) = torch.autograd.grad(numbers, leaf, weights)
    finally:
        handle.remove()
    return grad.abs().amax(-1) > 0


def _stream(entered: list[Tensor], outputs: Sequence[Tensor | None], known: bool) -> Tensor | None:
    """The residual stream before a block of a pre-norm layer: the layer's input plus the blocks before.

    None if unknown: a layer that is no plain sum (layer scale) gets no correction for what its input brought in.
    """
    if not known or any(o is None for o in outputs):
        return None
    total = entered[0]
    for output in outputs:
        total = total + output  # type: ignore[operator]
    return total


def _blocks_before(found: Sites, layer: Layer, site: Site) -> list[Site]:
    blocks = [*(found.heads[h] for h in layer.heads), found.neurons[layer.neurons]]
    return blocks[: next(i for i, block in enumerate(blocks) if block.name == site.name)]


def _run(model: nn.Module, inputs: Batch) -> None:
    try:
        model(**inputs)
    except _Reached:
        return


@contextmanager
def _layer_input(module: nn.Module) -> Iterator[list[Tensor]]:
    """The hidden states that a layer is called with."""
    seen: list[Tensor] = []

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen[:] = [args[0] if args else kwargs["hidden_states"]]

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def _stop_after(module: nn.Module) -> Iterator[None]:
    def hook(*_: Any) -> None:
        raise _Reached

    with ExitStack() as stack:
        stack.callback(module.register_forward_hook(hook).remove)
        yield


@contextmanager
def _stop_before(module: nn.Module) -> Iterator[None]:
    def hook(*_: Any) -> None:
        raise _Reached

    with ExitStack() as stack:
        stack.callback(module.register_forward_pre_hook(hook).remove)
        yield
