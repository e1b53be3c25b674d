"""The GLUE tasks by name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from secateur.errors import InvalidData

if TYPE_CHECKING:
    from datasets import Dataset

HUB_DATASET = "nyu-mll/glue"
DATA_VARIABLE = "SECATEUR_DATA"


@dataclass(frozen=True)
class Preset:
    """What a GLUE task's columns mean.

    Attributes:
        columns: its text columns.
        metrics: its official metrics, the deciding one first.
        label_names: its classes in the order of their ids; None for regression.
        validation: name of its validation split.
    """

    columns: tuple[str, ...]
    metrics: tuple[str, ...]
    label_names: tuple[str, ...] | None
    validation: str = "validation"


PRESETS: dict[str, Preset] = {
    "cola": Preset(("sentence",), ("matthews", "accuracy"), ("unacceptable", "acceptable")),
    "sst2": Preset(("sentence",), ("accuracy",), ("negative", "positive")),
    "mrpc": Preset(("sentence1", "sentence2"), ("accuracy", "f1"), ("not_equivalent", "equivalent")),
    "stsb": Preset(("sentence1", "sentence2"), ("spearman", "pearson"), None),
    "qqp": Preset(("question1", "question2"), ("accuracy", "f1"), ("not_duplicate", "duplicate")),
    "mnli": Preset(
        ("premise", "hypothesis"), ("accuracy",), ("entailment", "neutral", "contradiction"), "validation_matched"
    ),
    "qnli": Preset(("question", "sentence"), ("accuracy",), ("entailment", "not_entailment")),
    "rte": Preset(("sentence1", "sentence2"), ("accuracy",), ("entailment", "not_entailment")),
}


def preset_name(spec: str) -> str | None:
    """Return the preset that `"sst2"` or `"glue/sst2"` names, or None."""
    name = spec.strip().lower().removeprefix("glue/")
    return name if name in PRESETS else None


def preset_splits(name: str) -> dict[str, Dataset]:
    """Return the splits of a preset, from `$SECATEUR_DATA/<name>` if that is set, else from the hub.

    Raises:
        InvalidData: if the data cannot be had; the message says how to get it.
    """
    folder = os.environ.get(DATA_VARIABLE)
    if folder:
        from secateur.tasks.files import read_folder

        where = Path(folder).expanduser() / name
        if not where.is_dir():
            raise InvalidData(
                f"{DATA_VARIABLE} is set but {where} is not a folder: put {name}'s train and validation files there, "
                f"or unset {DATA_VARIABLE} to read {HUB_DATASET} from the hub"
            )
        return read_folder(where, validation=PRESETS[name].validation)
    return _from_hub(name)


def _from_hub(name: str) -> dict[str, Dataset]:
    from datasets import load_dataset

    try:
        found = load_dataset(HUB_DATASET, name)
    except Exception as error:  # the hub client raises many kinds, all of which mean that the data is not to be had
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InvalidData(
            f"could not load {HUB_DATASET} ({name}) from the hub: {reason[:160]} - connect to the network once, or set "
            f"{DATA_VARIABLE} to a folder that holds {name}/train.parquet and {name}/validation.parquet"
        ) from error
    splits = {"train": found["train"], "validation": found[PRESETS[name].validation]}
    if "test" in found:
        splits["test"] = found["test"]
    return splits
