"""BiT's released optimiser, to compare with: Adam without bias correction, each tensor's gradient clipped."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.nn.utils import clip_grad_norm_

from secateur.train import loop


class BertAdam(torch.optim.Optimizer):
    """Adam without bias correction, with decoupled weight decay; every tensor's gradient is clipped to a norm of 1."""

    def __init__(self, groups: Any, lr: float, eps: float) -> None:
        super().__init__(groups, {"lr": lr, "betas": (0.9, 0.999), "eps": eps, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        """Take a step."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in (p for p in group["params"] if p.grad is not None):
                clip_grad_norm_(p, 1.0)
                state = self.state[p]
                if not state:
                    state["mean"], state["square"] = torch.zeros_like(p), torch.zeros_like(p)
                state["mean"].lerp_(p.grad, 1 - beta1)
                state["square"].mul_(beta2).addcmul_(p.grad, p.grad, value=1 - beta2)
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.addcdiv_(state["mean"], state["square"].sqrt().add_(group["eps"]), value=-group["lr"])


@contextmanager
def released_optimizer() -> Iterator[None]:
    """Let training take `BertAdam` for a while, with the groups and rates that AdamW would have had."""
    usual, arguments = loop.CompressionTrainer.create_optimizer, loop._arguments

    def create(trainer: Any, model: Any = None) -> torch.optim.Optimizer:
        groups = usual(trainer, model).param_groups
        kept = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in groups]
        trainer.optimizer = BertAdam(kept, trainer.args.learning_rate, trainer.args.adam_epsilon)
        return trainer.optimizer

    def unclipped(*args: Any) -> Any:
        found = arguments(*args)
        found.max_grad_norm = 0.0
        return found

    with patch.object(loop.CompressionTrainer, "create_optimizer", create), patch.object(loop, "_arguments", unclipped):
        yield
