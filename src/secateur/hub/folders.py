"""Folders that are written whole or not at all."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import SecateurError


def save_folder(folder: str | Path, write: Callable[[Path], None]) -> Path:
    """Write a folder whole or not at all: `write` fills a temporary sibling, which then takes the folder's place.

    If anything fails on the way (a full disk, a signal), an existing folder stays as it was.

    Args:
        folder: the target.
        write: fills the empty folder it is given.

    Returns:
        The target.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise SecateurError(f"'{folder}' is a file: name a folder to write to.")
    fresh, old = target.with_name(f".{target.name}.new"), target.with_name(f".{target.name}.old")
    try:
        _restore(old, target)  # a kill may have struck between the two renames below
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        write(fresh)
        if target.exists():
            target.rename(old)
        fresh.rename(target)
    except OSError as error:
        raise SecateurError(
            f"'{folder}' was not written ({error.strerror or error}); what was there is untouched."
        ) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
        _restore(old, target)
    return target


def _restore(old: Path, target: Path) -> None:
    """Put a folder that was moved aside back if nothing took its place, else forget it."""
    if old.exists() and not target.exists():
        old.rename(target)
    shutil.rmtree(old, ignore_errors=True)


def check_target(folder: str | Path, mark: str, source: str = "") -> None:
    """Refuse to replace what is not an earlier output.

    Args:
        folder: where an output is to be written.
        mark: a file that an earlier output holds.
        source: the model that is read, which must stay.

    Raises:
        SecateurError: the folder is a file, holds something else, or is the source.
    """
    target = Path(folder).resolve()
    if target.exists() and not target.is_dir():
        raise SecateurError(f"'{folder}' is a file: name a folder to write to.")
    place = Path(source).resolve()
    if source and (target == place or (place.is_dir() and target in place.parents)):
        raise SecateurError(f"'{folder}' is or holds the model itself: name another folder to write to.")
    if target.is_dir() and any(target.iterdir()) and not (target / mark).is_file():
        raise SecateurError(f"'{folder}' holds something else than an earlier result: name another folder to write to.")


def write_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, card: str | None = None
) -> None:
    """Write model, tokenizer and model card into a folder."""
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:  # safetensors reports a full disk as its own error
        raise OSError(str(error)) from error
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def bytes_on_disk(model: PreTrainedModel) -> int:
    """Bytes of the weight files that `save_pretrained` writes."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(file.stat().st_size for file in Path(folder).glob("*.safetensors"))


def given_bytes(source: str) -> int | None:
    """Bytes of the weight files in a folder; None if it is none."""
    sizes = [file.stat().st_size for file in Path(source).glob("*.safetensors")] if Path(source).is_dir() else []
    return sum(sizes) or None


def save_model(folder: str | Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None) -> Path:
    """Save model and tokenizer as one folder, whole or not at all."""
    return save_folder(folder, lambda fresh: write_model(fresh, model, tokenizer))
