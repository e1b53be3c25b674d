"""What commands share: their options, how these are read, and how a record is shown."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Annotated, Any

import typer

from secateur.errors import SecateurError

Model = Annotated[str, typer.Argument(help="A model folder, or a hub id.")]
TaskOption = Annotated[
    str,
    typer.Option(
        "--task", "-t", help="A GLUE task (sst2, glue/stsb, …), a CSV/JSONL/Parquet file, or a folder of them."
    ),
]
TokenizerOption = Annotated[
    str | None, typer.Option(help="Folder or hub id of the tokenizer, if the model's has none.")
]
TextOption = Annotated[
    list[str] | None, typer.Option(help="Text column, or two: premise,hypothesis, or the option twice.")
]
LabelOption = Annotated[str | None, typer.Option(help="Label column.")]
MetricOption = Annotated[str | None, typer.Option(help="accuracy, f1, matthews, pearson, spearman or entity_f1.")]
SplitOption = Annotated[str | None, typer.Option(help="Rows to judge by: validation (default), test or train.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Examples per pass, for MACs and latency.")]
TokensOption = Annotated[
    int | None, typer.Option(min=1, help="Tokens per example; the task's median length by default.")
]
SeedOption = Annotated[int, typer.Option(help="Seed of every random choice.")]
ThreadsOption = Annotated[int | None, typer.Option(min=1, help="Threads of torch; all cores by default.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, nothing else.")]
SpeedupOption = Annotated[
    str | None, typer.Option(help="Where to turn the model's latency dial, such as 2, or several: 1,1.5,2,3.")
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", help="A hyper-parameter of the method, such as lambda_c=0.1; repeat for more."),
]


def show(record: Any, as_json: bool, human: Callable[[], None]) -> None:
    if as_json:
        typer.echo(json.dumps(record))
    else:
        human()


def use_threads(count: int | None) -> None:
    if count is not None:
        import torch

        torch.set_num_threads(count)


def columns_from(text: list[str] | None) -> list[str] | None:
    """Names of columns, given one by one or joined with commas."""
    return [name.strip() for part in text for name in part.split(",")] if text else None


def speedups_from(text: str | None) -> list[float] | None:
    """Numbers joined with commas."""
    if text is None:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise SecateurError(f"--speedup takes numbers from 1, such as 1,1.5,2, not '{text}'.") from None


def settings_from(pairs: list[str] | None) -> dict[str, Any]:
    """`key=value` pairs; values are read as JSON where they are, else as text."""
    found: dict[str, Any] = {}
    for pair in pairs or []:
        key, equals, value = pair.partition("=")
        if not equals:
            raise SecateurError(f"--set takes key=value, not '{pair}'.")
        try:
            found[key.strip()] = json.loads(value)
        except json.JSONDecodeError:
            found[key.strip()] = value.strip()
    return found


def numbers_text(values: dict[str, Any]) -> str:
    def text(value: Any) -> str:
        if isinstance(value, dict):
            return f"({numbers_text(value)})"
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return ", ".join(f"{key} {text(value)}" for key, value in values.items())
