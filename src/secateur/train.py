"""Fine-tuning with transformers' `Trainer`: length buckets, checkpoints that survive a kill, an atomic result."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

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
    set_seed,
)
from transformers.utils import logging as transformers_logging

from secateur.errors import InvalidModel, SecateurError
from secateur.hub import save_folder, write_model
from secateur.progress import Advance
from secateur.progress import progress as show_progress
from secateur.tasks.batching import BucketSampler, Encoded, encode, token_limit
from secateur.tasks.heads import open_base
from secateur.tasks.task import Task, fingerprint

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PAD_MULTIPLE = 8  # finer than for evaluation: a step costs so much that padding outweighs new shapes
COMPLETE = "complete"  # written into a checkpoint after everything else
RECORD = "finetune.json"


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


def finetune(
    model: str | Path | PreTrainedModel,
    tokenizer: str | Path | PreTrainedTokenizerBase | None,
    task: Task,
    out: str | Path,
    *,
    epochs: int = 3,
    lr: float = 5e-5,
    batch_size: int = 32,
    max_length: int = 128,
    warmup: float = 0.06,
    weight_decay: float = 0.01,
    seed: int = 0,
    dropout: float | None = None,
    bf16: bool | Literal["auto"] = "auto",
    resume: bool = False,
    progress: bool = False,
    checkpoint_seconds: float = 60.0,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Fine-tune a model on a task and save it as a folder that `AutoModelForSequenceClassification` opens.

    Checkpoints live in `<out>.run` beside the result until it is complete; a run that was killed goes on from the last
    one with `resume=True` and ends in the same weights, bit for bit at the same number of threads.

    Args:
        model: folder, hub id, or a live model, which is trained in place; it gets a new head unless it has one that
            fits.
        tokenizer: of the model; read from the model's folder if None.
        task: needs training rows.
        out: the folder to make; it must not exist, or be empty.
        epochs: passes over the training rows.
        lr: peak learning rate.
        batch_size: examples per step.
        max_length: tokens beyond this are cut off.
        warmup: share of the steps over which the learning rate rises.
        weight_decay: of AdamW.
        seed: of the new head, the order of the rows and dropout.
        dropout: share of activations set to zero; None keeps the model's. 0 trains a quarter faster on a CPU.
        bf16: bfloat16 autocast; `"auto"` uses it where the hardware multiplies in it.
        resume: go on from the checkpoints of a killed run with the same settings; from the start if there are none.
        progress: show progress on standard error.
        checkpoint_seconds: time between checkpoints.
        callbacks: more callbacks for the `Trainer`.

    Returns:
        `out`.

    Raises:
        InvalidData: if the task has no training rows.
        InvalidModel: if the model cannot be opened, or the loss is not finite.
        SecateurError: if `out` is taken, or `resume` finds a run with other settings.
    """
    out = Path(out)
    use_bf16 = bf16_pays() if bf16 == "auto" else bf16
    settings = Settings(epochs, lr, batch_size, max_length, warmup, weight_decay, seed, dropout, use_bf16)
    task.split("train")
    set_seed(seed)
    with _quiet():
        net, tokens = open_base(model, tokenizer, task)
    record = {"settings": asdict(settings), "data": fingerprint(task), "start": _weights_hash(net)}
    folder = out.with_name(out.name + ".run")
    if _finished(out, record, resume):
        return out
    _prepare_run(folder, record, resume)
    rows = encode(task, "train", tokens, max_length=min(max_length, token_limit(tokens, net)))
    trainer = BucketTrainer(
        model=net,
        args=_arguments(folder, settings),
        train_dataset=_Rows(rows),
        callbacks=[_Checkpoints(checkpoint_seconds), *callbacks],
    )
    trainer.remove_callback(PrinterCallback)  # it writes to standard output
    start = last_checkpoint(folder)
    steps = -(-len(rows) // batch_size) * epochs
    with _quiet(), show_progress(f"fine-tuning on {task.name}", steps, show=progress) as advance:
        trainer.add_callback(_Progress(advance))
        with _dropout(net, dropout):
            trainer.train(resume_from_checkpoint=str(start) if start else None)
        _check_finite(net)
        net.eval()
        _save(net, tokens, out, record)
    shutil.rmtree(folder)
    return out


def bf16_pays() -> bool:
    """Return whether this machine multiplies in bfloat16: a GPU that does, or a CPU with AMX or AVX-512 for it."""
    if torch.cuda.is_available():
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(capabilities.get("amx_bf16") or capabilities.get("avx512_bf16"))


def last_checkpoint(folder: Path) -> Path | None:
    """Return the newest checkpoint of a run that was written to its end, or None."""
    complete = [path.parent for path in folder.glob(f"checkpoint-*/{COMPLETE}")]
    return max(complete, key=lambda path: int(path.name.rpartition("-")[2]), default=None)


class BucketTrainer(Trainer):
    """A `Trainer` whose batches hold examples of like length. The training set must be an encoded split's rows."""

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

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a checkpoint if the last one is old, except after the last step."""
        if time.monotonic() - self.last >= self.seconds and state.global_step < state.max_steps:
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
        """Remember the loss; stop if it is not finite, for nothing can be learned from then on."""
        if logs and "loss" in logs:
            loss = float(logs["loss"])
            if not math.isfinite(loss):
                raise InvalidModel(f"training diverged at step {state.global_step}: lower lr (--lr), or turn bf16 off")
            self.note = f"loss {loss:.3f}"

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


def _weights_hash(model: PreTrainedModel) -> str:
    """Return a hash of the weights at the start, head included."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def _finished(out: Path, record: dict[str, Any], resume: bool) -> bool:
    """Return whether `out` already is the result asked for; refuse to write over anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    path = out / RECORD
    if resume and path.is_file() and json.loads(path.read_text()) == record:
        return True
    raise SecateurError(f"{out} already exists: remove it, or write to another folder")


def _prepare_run(folder: Path, record: dict[str, Any], resume: bool) -> None:
    """Make the run folder, or check that the one there belongs to the same run."""
    path = folder / RECORD
    if resume and path.is_file():
        if json.loads(path.read_text()) != record:
            raise SecateurError(
                f"{folder} holds a run with other settings, data or weights: use the same, or start anew without resume"
            )
        for checkpoint in folder.glob("checkpoint-*"):
            if not (checkpoint / COMPLETE).exists():  # a kill came while it was written
                shutil.rmtree(checkpoint)
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record))
    os.replace(partial, path)


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


def _check_finite(model: PreTrainedModel) -> None:
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(parameter).all()):
            raise InvalidModel(f"training diverged ({name} is not finite): lower lr, or turn bf16 off")


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, record: dict[str, Any]) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # else the last call's truncation would be stored in tokenizer.json
        backend.no_truncation()
        backend.no_padding()

    def write(folder: Path) -> None:
        write_model(folder, model, tokenizer)
        (folder / RECORD).write_text(json.dumps(record))

    save_folder(out, write)


@contextmanager
def _quiet() -> Iterator[None]:
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
