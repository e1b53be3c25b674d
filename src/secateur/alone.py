"""Candidates that are cut out first and fine-tuned each by itself, in as many stages as halving grants them."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from secateur.prune import cut_out
from secateur.run import Job, Run
from secateur.subnetwork import SubNetwork
from secateur.tasks import evaluate
from secateur.train import KeepBest, Settings
from secateur.train.binarizing import BEST


class Alone:
    """Trains sub-networks of a model, each from the model's own weights.

    Args:
        model: what they are cut out of.
        job: with the rows to train and to judge by.
        settings: of the whole training, of which a candidate may see the beginning only.
        folder: where the checkpoints of candidates are kept, so that each can go on.
    """

    def __init__(self, model: PreTrainedModel, job: Job, settings: Settings, folder: Path) -> None:
        self.model, self.settings, self.folder = model, settings, folder
        self.job = replace(job, run=Run(folder, {}, resume=folder.exists()))

    def error(self, sub: SubNetwork, epochs: int) -> float:
        """1 - metric of a sub-network after so many epochs in all, of which the best one counts."""
        best = KeepBest(self._score, self.folder / sub.digest)
        if len(best.kept()) < epochs:
            model = copy.deepcopy(self.model)
            cut_out(model, sub)
            self.job.trained(model, self.settings, [_Until(epochs), best], stage=sub.digest)
        return 1 - max(list(best.kept().values())[:epochs])

    def weights(self, sub: SubNetwork) -> dict[str, Tensor]:
        """Those of its best epoch."""
        return load_file(self.folder / sub.digest / BEST)

    def _score(self, model: PreTrainedModel) -> float:
        found = evaluate(model, self.job.tokenizer, self.job.task, "validation")
        return found.metrics[self.job.task.metric]


class _Until(TrainerCallback):
    """Stops after an epoch, with a checkpoint to go on from."""

    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Stop, unless it is the last epoch of all."""
        if self.epochs <= round(state.epoch or 0) < args.num_train_epochs:
            control.should_training_stop = control.should_save = True
