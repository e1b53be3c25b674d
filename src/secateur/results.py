"""What a compression gives back: the compressed model, and the record of how it came about."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur import hub
from secateur.costs.analytic import encoder_params, macs, params
from secateur.costs.latency import Timing
from secateur.errors import SecateurError
from secateur.report import write_report
from secateur.report.card import card
from secateur.run import read_json, write_json
from secateur.subnetwork import SubNetwork

SCHEMA = 1


@dataclass
class Measurement:
    """One model, counted and measured.

    Attributes:
        macs: multiply-adds of one forward pass at the run's batch and length.
        params: parameters; `encoder_params` those inside the layer stacks.
        bytes: size of the weights on disk.
        metrics: metric name → value, as fractions (0.9 = 90 %).
        latency_ms: `median`, `p90` in milliseconds, and `n` runs.
    """

    macs: int
    params: int
    encoder_params: int
    bytes: int
    metrics: dict[str, float]
    latency_ms: dict[str, float]


@dataclass
class Result:
    """A compressed model and the record of how it came about (`result.json`).

    Attributes:
        given_bytes: size of the weight files that were opened, in whatever precision; None of a live model or a hub id.
        model: the compressed model, ready to use, `save_pretrained` or train further.
        tokenizer: its tokenizer, if the model reads text.
        name: short name of the method's setting.
        source: what was compressed: a folder, a hub id, or the class of a live model.
        task, method, budget: what was asked, as JSON.
        before, after: measurements of the model as given and of the compressed one.
        predicted: what the cost models said of the compressed model.
        latency_setting: batch, tokens, threads and dtype of MACs and milliseconds.
        seconds: wall time by stage.
        edits: the changes, as in `config.json`.
        subnetwork, blocks, scores: kept units, their blocks' names, and every unit's score.
    """

    name: str
    source: str
    task: dict[str, Any]
    method: dict[str, Any]
    budget: dict[str, Any]
    before: Measurement
    after: Measurement
    predicted: dict[str, float]
    latency_setting: dict[str, Any]
    seconds: dict[str, float]
    seed: int
    versions: dict[str, str]
    machine: dict[str, Any]
    data: dict[str, Any]
    command: str
    edits: list[dict[str, Any]]
    subnetwork: dict[str, Any]
    blocks: dict[str, list[str]]
    scores: dict[str, list[list[float]]]
    model: PreTrainedModel = field(repr=False)
    tokenizer: PreTrainedTokenizerBase | None = field(repr=False, default=None)
    given_bytes: int | None = None

    def to_dict(self) -> dict[str, Any]:
        """The content of `result.json`."""
        live = ("model", "tokenizer", "source")
        record = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in live}
        record["before"], record["after"] = asdict(self.before), asdict(self.after)
        return {"secateur": record["versions"]["secateur"], "schema": SCHEMA, "model": self.source, **record}

    def report(self, path: str | Path) -> Path:
        """Write the self-contained HTML report."""
        return write_report([self.to_dict()], path)

    def save(self, folder: str | Path) -> Path:
        """Write model, tokenizer, model card, `result.json` and `report.html` as one folder, whole or not at all."""
        hub.check_target(folder, "result.json")
        record = self.to_dict()

        def write(fresh: Path) -> None:
            hub.write_model(fresh, self.model, self.tokenizer, card(record))
            write_json(fresh / "result.json", record)
            write_report([record], fresh / "report.html")

        return hub.save_folder(folder, write)


def measured(model: PreTrainedModel, batch: int, tokens: int, metrics: dict[str, float], timing: Timing) -> Measurement:
    """What a model costs, counted and timed, and what it scores.

    Args:
        model: the model.
        batch: examples per pass.
        tokens: tokens per example.
        metrics: what it scores, as fractions.
        timing: of the model.
    """
    full = SubNetwork.full(model)

    def count(cost: Callable[..., Any], *args: int) -> int:
        return round(cost(model, *args).of(full))

    return Measurement(
        macs=count(macs, batch, tokens),
        params=count(params),
        encoder_params=count(encoder_params),
        bytes=hub.bytes_on_disk(model),
        metrics=metrics,
        latency_ms={"median": timing.median, "p90": timing.p90, "n": timing.n},
    )


def versions() -> dict[str, str]:
    """Versions of the packages that decide the numbers."""
    names = ("secateur", "torch", "transformers", "safetensors", "datasets", "torchmetrics")
    found = {}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def weights_digest(model: torch.nn.Module) -> str:
    """Hash of every weight, so that a run is not resumed on another model."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(
            tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            if tensor.numel()
            else b""
        )
    return digest.hexdigest()[:16]


def vocabulary_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Hash of a tokenizer's words and their ids."""
    return hashlib.sha256(json.dumps(sorted(tokenizer.get_vocab().items())).encode()).hexdigest()[:16]


def read_result(path: str | Path) -> dict[str, Any]:
    """The content of a `result.json`, or of the one in a folder.

    Raises:
        SecateurError: there is none, or it has another schema.
    """
    file = Path(path) / "result.json" if Path(path).is_dir() else Path(path)
    try:
        record = read_json(file)
    except (OSError, ValueError) as error:
        raise SecateurError(f"'{path}' is no result: expected a result.json ({type(error).__name__}).") from None
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        raise SecateurError(f"'{file}' is no result of this version (schema {SCHEMA}).")
    return record
