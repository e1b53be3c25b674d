"""Training a super-network: one model whose sub-networks work with the weights they inherit (arXiv 2405.02267)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.errors import SecateurError
from secateur.families import Sites, sites
from secateur.gates import only
from secateur.optimize.spaces import Space
from secateur.subnetwork import SubNetwork
from secateur.train.losses import output_distance

Strategy = Literal["standard", "random", "linear", "sandwich", "distilled", "one-shot"]
Draw = Callable[[random.Random], SubNetwork]


@dataclass(frozen=True)
class Passes:
    """What one step trains.

    Attributes:
        full: whether the loss of the full network counts.
        subs: sub-networks whose losses count.
        distils: whether they learn from the full network's outputs, besides the labels.
    """

    full: bool
    subs: tuple[SubNetwork, ...] = ()
    distils: bool = False


class SuperNetwork(TrainerCallback):
    """What a step trains, as a callback; and its loss, the sum over its passes, as an `objective`.

    * "standard": the full network.
    * "random": `count` random sub-networks.
    * "linear": those with a probability that rises from 0 to 1 over the steps, else the full network.
    * "sandwich": the full network, the smallest one and random ones.
    * "distilled": as "linear", and sub-networks learn from the full network's outputs too (in-place distillation).
    * "one-shot": as "sandwich", and all but the full network learn from its outputs too.

    What is drawn depends on the seed and the step alone: a resumed run and every process draw the same.

    Args:
        space: which sub-networks there are.
        strategy: what a step trains.
        count: random sub-networks of a step; the paper's 1 for "random" and "linear" and 2 for others if None.
        temperature: T of the distillation.
        draw: gives a random sub-network; `space.sample` if None.
        seed: of the draws.
    """

    def __init__(
        self,
        space: Space,
        strategy: Strategy = "one-shot",
        *,
        count: int | None = None,
        temperature: float = 10.0,
        draw: Draw | None = None,
        seed: int = 0,
    ) -> None:
        if strategy not in get_args(Strategy):
            raise SecateurError(f"A super-network is trained {', '.join(get_args(Strategy))}, not {strategy!r}.")
        if count is not None and count < 1:
            raise SecateurError(f"A step trains 1 random sub-network or more, not {count}.")
        if not temperature > 0:
            raise SecateurError(f"The temperature is above 0, not {temperature:g}.")
        self.space = space
        self.strategy = strategy
        self.count = count or (1 if strategy in ("random", "linear") else 2)
        self.temperature = temperature
        self.draw: Draw = draw or (lambda source: space.decode(space.sample(source)))
        self.seed = seed
        self.passes = Passes(True)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Draw what this step trains; the micro-batches of a step share it."""
        self.passes = self.at(state.global_step, state.max_steps)

    def at(self, step: int, steps: int) -> Passes:
        """What a step, from 0, of so many trains."""
        source = random.Random(f"{self.seed}-{step}")
        if self.strategy == "standard":
            return Passes(True)
        if self.strategy in ("linear", "distilled") and source.random() >= step / max(steps - 1, 1):
            return Passes(True)
        drawn = tuple(self.draw(source) for _ in range(self.count))
        if self.strategy in ("random", "linear"):
            return Passes(False, drawn)
        if self.strategy == "distilled":
            return Passes(False, drawn, True)
        return Passes(True, (self.space.decode(self.space.smallest), *drawn), self.strategy == "one-shot")

    def objective(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        """The sum of the losses of a step's passes over a batch with labels."""
        if not isinstance(model, DistributedDataParallel):
            return self._loss(model, sites(getattr(model, "module", model)), batch)
        whole = model.module  # processes wait for each other once in a step: all its passes are one call
        usual, inside, own = whole.forward, sites(whole), whole.__dict__.get("forward")
        whole.forward = lambda **given: self._loss(usual, inside, given)
        try:
            return cast(Tensor, model(**batch))
        finally:
            if own is None:
                del whole.__dict__["forward"]
            else:  # that of autocast
                whole.forward = own

    def _loss(self, model: Callable[..., Any], inside: Sites, batch: dict[str, Tensor]) -> Tensor:
        passes, total = self.passes, None
        wanted = None
        if passes.full or passes.distils:
            with torch.set_grad_enabled(passes.full):
                found = model(**batch)
            wanted = found.logits.detach()
            total = found.loss if passes.full else None
        for sub in passes.subs:
            with only(inside, sub, views=not isinstance(model, nn.DataParallel)):
                found = model(**batch)
            loss = found.loss
            if passes.distils and wanted is not None:
                loss = in_place_distillation(found.logits, wanted, loss, self.temperature)
            total = loss if total is None else total + loss
        if total is None:
            raise SecateurError("A super-network needs a loss: train it on rows with labels.")
        return total


def in_place_distillation(logits: Tensor, wanted: Tensor, loss: Tensor, temperature: float) -> Tensor:
    """T² · KL(full ‖ sub) at temperature T plus the loss on labels; of single outputs their squared difference alone.

    The paper's cross-entropy to the full network's probabilities differs by their entropy, which has no gradient here.

    Args:
        logits: of the sub-network, (examples, outputs).
        wanted: of the full network on the same batch, without a gradient.
        loss: of the sub-network on the labels.
        temperature: T.
    """
    distance = output_distance(logits, wanted, temperature)
    return distance if logits.shape[-1] == 1 else distance + loss
