"""Opening models and tokenizers, with errors of one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
import transformers
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.errors import InvalidModel, SecateurError

MOST_LAYERS = 1000
"""More than any model has: a number beyond is damage."""


def open_model(
    source: str | Path, cls: Any = AutoModelForSequenceClassification, *, trained: bool = False, **options: Any
) -> PreTrainedModel:
    """`AutoModelFor….from_pretrained` with one-line errors; folders and hub ids, safetensors only.

    Args:
        source: a folder, or a hub id.
        cls: the transformers class to open it with.
        trained: refuse a checkpoint that lacks weights of the class, such as the head of a model that was never
            fine-tuned; transformers would draw them at random.
        options: passed to `from_pretrained`; `dtype` defaults to float32.

    Raises:
        InvalidModel: no model there, damaged or pickled weights, a config that does not fit the weights.
    """
    what = str(source)
    _check_folder(Path(source), what)
    options = {"dtype": torch.float32, "use_safetensors": True} | options
    try:
        model, loading = cls.from_pretrained(what, output_loading_info=True, **options)
    except SecateurError:
        raise
    except SafetensorError as error:
        raise InvalidModel(f"The weights in '{what}' are damaged ({error}): download or compress again.") from None
    except Exception as error:  # a damaged config surfaces anywhere in a model's constructor
        raise InvalidModel(_why(what, error)) from None
    missing = sorted(loading["missing_keys"])
    if trained and missing:
        raise InvalidModel(
            f"'{what}' has no weights for {', '.join(missing[:3])}: it was not fine-tuned for this kind of task; "
            "run `secateur finetune` first."
        )
    return cast(PreTrainedModel, model)


def open_any(source: str | Path, *, trained: bool = False) -> PreTrainedModel:
    """Open a folder or hub id with the class its config names, so that every weight has a place.

    Args:
        source: a folder or a hub id.
        trained: as `open_model`.

    Raises:
        InvalidModel: as `open_model`.
    """
    _check_folder(Path(source), str(source))
    try:
        config = AutoConfig.from_pretrained(str(source))
        named = [getattr(transformers, name, None) for name in config.architectures or []]
    except Exception as error:  # configs are checked by errors of many kinds
        raise InvalidModel(_why(str(source), error)) from None
    layers = getattr(config, "num_hidden_layers", None)
    if isinstance(layers, int) and layers > MOST_LAYERS:  # which transformers would make one by one
        raise InvalidModel(f"'{source}' cannot be opened: its config.json says {layers} layers.")
    return open_model(source, next((cls for cls in named if cls is not None), AutoModel), trained=trained)


def open_tokenizer(source: str | Path) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained` with a one-line error.

    Raises:
        InvalidModel: there is no tokenizer.
    """
    try:
        return AutoTokenizer.from_pretrained(str(source))
    except Exception as error:  # tokenizers raise bare exceptions on damaged files
        raise InvalidModel(f"'{source}' has no usable tokenizer: {_first_line(error)}") from None


def _check_folder(folder: Path, what: str) -> None:
    """Refuse what transformers would take minutes, or a pickle, to find out about a local path."""
    if folder.is_file():
        raise InvalidModel(f"'{what}' is a file: name the folder that holds config.json and model.safetensors.")
    if not folder.is_dir():
        if what.startswith((".", "/", "~")) or what.count("/") > 1:
            raise InvalidModel(f"There is no folder '{what}'.")
        return
    if not (folder / "config.json").is_file():
        raise InvalidModel(f"'{what}' is no model folder: it has no config.json.")
    if not any(folder.glob("*.safetensors")):
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        if pickles:
            raise InvalidModel(
                f"'{what}' has only pickled weights ({pickles[0]}), which can run code: convert them to "
                f"safetensors first."
            )
        raise InvalidModel(f"'{what}' has no model.safetensors.")


def _why(what: str, error: BaseException) -> str:
    where = "" if Path(what).exists() else " (there is no such folder, so it was looked for on the hub)"
    return f"'{what}' cannot be opened{where}: {_first_line(error)}"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if len(lines) > 1 and lines[0].endswith(":"):
        return f"{lines[0]} {lines[1]}"  # of what a config's field is, and what it should be
    return lines[0] if lines else type(error).__name__
