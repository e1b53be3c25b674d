"""Training with transformers' `Trainer`: length buckets, and checkpoints that survive a kill."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.utils import logging as transformers_logging

from secateur.bits.modules import quantizers
from secateur.edits import Sparsify
from secateur.edits.sparsify import hold_zeros
from secateur.hub import edits_of
from secateur.progress import Advance
from secateur.progress import progress as show_progress
from secateur.sparsity.selection import Units
from secateur.sparsity.weights import prunable
from secateur.tasks.batching import BucketSampler, Encoded, encode, token_limit
from secateur.tasks.task import Task
from secateur.train.binarizing import LatentWeights
from secateur.train.finite import StopsWhenDiverged, check_finite, diverged
from secateur.train.losses import Objective
from secateur.train.precision import bf16_products
from secateur.train.pruning import Pruning

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD_MULTIPLE = 8  # finer than for evaluation: a step costs so much that padding outweighs new shapes
CHECKPOINT_SECONDS = 60.0
COMPLETE = "complete"  # written into a checkpoint after everything else


@dataclass(frozen=True)
class Settings:
    """What decides the result of a fine-tuning run, apart from the model and the data.

    Attributes:
        epochs: passes over the training rows.
        lr: peak learning rate of AdamW.
        batch_size: examples per step.
        max_length: tokens beyond this are cut off.
        warmup: share of the steps over which the learning rate rises from 0; it then falls to 0, linearly both ways.
        weight_decay: of AdamW, not on biases and norms.
        seed: of the new head, the order of the rows and dropout.
        dropout: share of activations set to zero; None keeps the model's.
        bf16: bfloat16 autocast.
        beta2, eps: of AdamW.
        scale_lr: peak learning rate of the scales of quantised activations, if another one.
        bf16_products: see `bf16_products`.
    """

    epochs: int
    lr: float
    batch_size: int
    max_length: int
    warmup: float
    weight_decay: float
    seed: int
    dropout: float | None
    bf16: bool
    beta2: float = 0.999
    eps: float = 1e-8
    scale_lr: float | None = None
    bf16_products: bool = False


def fit(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    task: Task,
    folder: Path,
    settings: Settings,
    *,
    objective: Objective | None = None,
    callbacks: Sequence[TrainerCallback] = (),
    progress: bool = False,
    seconds: float | None = None,
) -> None:
    """Train a live model in place on a task's training rows, and leave it in evaluation mode.

    Args:
        model: a model with a head that fits the task.
        tokenizer: of the model.
        task: needs training rows.
        folder: where checkpoints are kept, and looked for: training goes on from the newest whole one.
        settings: what decides the result.
        objective: the loss; the model's own if None.
        callbacks: more callbacks for the `Trainer`.
        progress: show progress on standard error.
        seconds: time between checkpoints; `CHECKPOINT_SECONDS` if None.

    Raises:
        InvalidData: if the task has no training rows.
        InvalidModel: if the loss is not finite.
    """
    rows = encode(task, "train", tokenizer, max_length=min(settings.max_length, token_limit(tokenizer, model)))
    trainer = BucketTrainer(
        model=model,
        args=_arguments(folder, settings),
        train_dataset=_Rows(rows),
        callbacks=[*callbacks, _Checkpoints(CHECKPOINT_SECONDS if seconds is None else seconds)],  # marks them last
        objective=objective,
        scale_lr=settings.scale_lr,
        bf16_products=settings.bf16_products,
    )
    trainer.remove_callback(PrinterCallback)  # it writes to standard output
    for checkpoint in folder.glob("checkpoint-*"):
        if not (checkpoint / COMPLETE).exists():  # a kill came while it was written
            shutil.rmtree(checkpoint)
    start = last_checkpoint(folder)
    steps = -(-len(rows) // settings.batch_size) * settings.epochs
    with quiet(), show_progress(f"fine-tuning on {task.name}", steps, show=progress) as advance:
        trainer.add_callback(_Progress(advance))
        with _dropout(model, settings.dropout), _zeros_held(model, callbacks):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
    _without_autocast(model)
    check_finite(model, steps)
    model.eval()


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class CompressionTrainer(Trainer):
    """A `Trainer` that takes pruning, and a loss such as `distilled`; it stops when the loss is not finite.

    Args:
        pruning: prunes while it trains (`Pruning`); any other `Trainer` takes it among its callbacks.
        objective: the loss; the model's own if None.
        scale_lr: peak learning rate of the scales of quantised activations; that of the weights if None.
        bf16_products: take steps with `bf16_products`.
    """

    def __init__(
        self,
        *args: Any,
        pruning: TrainerCallback | None = None,
        objective: Objective | None = None,
        scale_lr: float | None = None,
        bf16_products: bool = False,
        **kwargs: Any,
    ) -> None:
        self.latent = LatentWeights()
        first = [StopsWhenDiverged(), self.latent, *([] if pruning is None else [pruning])]
        kwargs["callbacks"] = [*first, *(kwargs.get("callbacks") or ())]
        super().__init__(*args, **kwargs)
        self.scale_lr = scale_lr
        self.bf16_products = bf16_products
        self.pruning = pruning
        self.objective: Objective | None = objective
        if objective is not None:
            self.loss_is_scaled_for_ga = False

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train, as any `Trainer`; latent weights of a binary model are read from the folder that it goes on from."""
        named = isinstance(resume_from_checkpoint, (str, os.PathLike))  # else True: the last one of `output_dir`
        self.latent.checkpoint = Path(str(resume_from_checkpoint)) if named else None
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Take a forward and a backward pass, as any `Trainer`."""
        with bf16_products() if self.bf16_products else nullcontext():
            return super().training_step(*args, **kwargs)

    def compute_loss(self, model: nn.Module, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the objective's loss in training, the model's own without one and in evaluation.

        Raises:
            InvalidModel: it is not finite in training: nothing can be learned from here on.
        """
        if not model.training:
            return super().compute_loss(model, inputs, *args, **kwargs)
        if self.objective is None:
            found = super().compute_loss(model, inputs, *args, **kwargs)
        else:
            found = self.objective(model, inputs)
        if not bool((found[0] if isinstance(found, tuple) else found).isfinite().all()):
            raise diverged(self.state.global_step)
        return found

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """Names of what decays: no biases and norms, and no scales and shifts of activations."""
        light = {id(p) for quantizer in quantizers(model) for p in quantizer.parameters()}
        return [n for n in super().get_decay_parameter_names(model) if id(model.get_parameter(n)) not in light]

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Return the optimiser; scales of activations are a group of their own, if they have a rate of their own."""
        optimizer = super().create_optimizer(model)
        if self.scale_lr is not None:
            scales = {
                id(q.alpha): q.alpha
                for q in quantizers(cast(nn.Module, self.model if model is None else model))
                if q.alpha.requires_grad
            }
            for group in optimizer.param_groups:
                group["params"] = [p for p in group["params"] if id(p) not in scales]
            optimizer.add_param_group({"params": list(scales.values()), "weight_decay": 0.0, "lr": self.scale_lr})
        return optimizer

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Log, and what pruning found at its last choice."""
        super().log(logs | (self.pruning.last if isinstance(self.pruning, Pruning) else {}), *args, **kwargs)


class BucketTrainer(CompressionTrainer):
    """A trainer whose batches hold examples of like length. The training set must be an encoded split's rows."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Return the batches of an epoch; their order depends on the seed and the epoch alone."""
        rows = cast(_Rows, self.train_dataset)
        sampler = BucketSampler(rows.encoded.lengths, self.args.train_batch_size, self.args.seed)
        collate = partial(rows.encoded.collate, multiple=PAD_MULTIPLE)
        loader: DataLoader[Any] = DataLoader(rows, batch_sampler=sampler, collate_fn=collate)
        prepared: DataLoader[Any] = self.accelerator.prepare(loader)
        return prepared


class _Rows(Dataset[int]):
    """Row numbers of an encoded split: the collator turns them into a batch."""

    def __init__(self, encoded: Encoded) -> None:
        self.encoded = encoded

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, row: int) -> int:
        return row


class _Checkpoints(TrainerCallback):
    """Asks for a checkpoint every so often, and marks it once it is whole."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.last = time.monotonic()

    def on_step_end(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        **_: Any,
    ) -> None:
        """Ask for a checkpoint if the last one is old, except after the last step, and never of a diverged model."""
        if time.monotonic() - self.last >= self.seconds and state.global_step < state.max_steps:
            if model is not None:
                check_finite(model, state.global_step)
            control.should_save = True

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Mark the checkpoint as whole: a kill while it was written leaves no mark."""
        folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        for path in folder.iterdir():
            _sync(path)
        (folder / COMPLETE).touch()
        self.last = time.monotonic()


class _Progress(TrainerCallback):
    """Reports steps and the loss."""

    def __init__(self, advance: Advance) -> None:
        self.advance = advance
        self.note = ""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **_: Any
    ) -> None:
        """Remember the loss."""
        if logs and "loss" in logs:
            self.note = f"loss {float(logs['loss']):.3f}"

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Report the step."""
        self.advance(state.global_step, self.note)


def _arguments(folder: Path, settings: Settings) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=settings.batch_size,
        learning_rate=settings.lr,
        weight_decay=settings.weight_decay,
        warmup_steps=settings.warmup if 0 < settings.warmup < 1 else 0,
        lr_scheduler_type="linear",
        optim="adamw_torch_fused",
        adam_beta2=settings.beta2,
        adam_epsilon=settings.eps,
        seed=settings.seed,
        bf16=settings.bf16,
        save_strategy="no",  # `_Checkpoints` decides
        save_total_limit=2,  # the one before stays until the new one is whole
        logging_steps=20,
        logging_nan_inf_filter=False,
        eval_strategy="no",
        report_to="none",
        push_to_hub=False,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=not torch.cuda.is_available(),
    )


@contextmanager
def _zeros_held(model: nn.Module, callbacks: Sequence[TrainerCallback]) -> Iterator[None]:
    """Keep the zeros of a sparse model where no other ones are chosen; heads and neurons that go leave them alone."""
    names = {name for edit in edits_of(model) if isinstance(edit, Sparsify) for name in edit.kept}
    for one in callbacks:
        if isinstance(one, Pruning) and not isinstance(one.pattern, Units):
            names -= set(prunable(model, one.settings.weights))
    handles = hold_zeros(model, names) if names else []
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _dropout(model: nn.Module, share: float | None) -> Iterator[None]:
    """Change the dropout of a live model for a while."""
    usual = {module: module.p for module in model.modules() if isinstance(module, nn.Dropout)}
    for module, p in usual.items():
        module.p = p if share is None else share
    try:
        yield
    finally:
        for module, p in usual.items():
            module.p = p


def _without_autocast(model: nn.Module) -> None:
    """Take away the forward pass that accelerate put on a model for training in half precision."""
    usual = model.__dict__.pop("_original_forward", None)
    if usual is not None:
        del model.__dict__["forward"]
        if usual.__func__ is not type(model).forward:
            model.forward = usual


@contextmanager
def quiet() -> Iterator[None]:
    """Turn transformers' bars and its warning of a new head off."""
    shown, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if shown:
            transformers_logging.enable_progress_bar()


def _sync(path: Path) -> None:
    """Flush a file to the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
