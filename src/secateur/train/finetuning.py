"""The verb `finetune`: a head and weights for a task, written as a folder whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import TrainerCallback, set_seed

from secateur.errors import AnotherRun, SecateurError
from secateur.hub import save_folder, write_model
from secateur.tasks.heads import open_base
from secateur.tasks.task import Task, fingerprint
from secateur.train.loop import Settings, fit, quiet
from secateur.train.precision import bf16_pays

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

RECORD = "finetune.json"


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
    checkpoint_seconds: float | None = None,
    callbacks: Sequence[TrainerCallback] = (),
) -> Path:
    """Fine-tune a model on a task and save it as a folder that plain transformers opens.

    With `AutoModelForSequenceClassification`, or `AutoModelForTokenClassification` for a class for each word.

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
    with quiet():
        net, tokens = open_base(model, tokenizer, task)
    record = {"settings": asdict(settings), "data": fingerprint(task), "start": _weights_hash(net)}
    folder = out.with_name(out.name + ".run")
    if _finished(out, record, resume):
        return out
    _prepare_run(folder, record, resume)
    fit(net, tokens, task, folder, settings, callbacks=callbacks, progress=progress, seconds=checkpoint_seconds)
    with quiet():
        _save(net, tokens, out, record)
    shutil.rmtree(folder)
    return out


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
            raise AnotherRun(
                f"{folder} holds a run with other settings, data or weights: use the same, or start anew without resume"
            )
        return
    if folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True)
    partial = path.with_suffix(".tmp")
    partial.write_text(json.dumps(record))
    os.replace(partial, path)


def _save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, out: Path, record: dict[str, Any]) -> None:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # else the last call's truncation would be stored in tokenizer.json
        backend.no_truncation()
        backend.no_padding()

    def write(folder: Path) -> None:
        write_model(folder, model, tokenizer)
        (folder / RECORD).write_text(json.dumps(record))

    save_folder(out, write)
