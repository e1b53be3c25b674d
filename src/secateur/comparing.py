"""Engines side by side: the same inputs through torch, the native engine and exported files, timed in turns."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from secateur.bits.modules import is_binary
from secateur.costs.inputs import dummy_inputs
from secateur.costs.machine import fingerprint
from secateur.costs.timers import sample, summarise
from secateur.errors import SecateurError
from secateur.exporting import FORMATS, export, input_names
from secateur.hub import open_any, open_tokenizer
from secateur.runtime import Engine, Precision, load
from secateur.train import bf16_pays

PRECISIONS: tuple[Precision, ...] = ("fp32", "bf16", "int8")
ENGINES = ("torch", "native", *FORMATS)
PARITY = 8
"""Examples on which logits are compared."""
Runner = Callable[[Mapping[str, Tensor]], Tensor]


def compare_engines(
    source: str | Path,
    engines: Sequence[str] = ("torch", "native"),
    *,
    batch: int = 1,
    tokens: int = 128,
    seconds: float = 6.0,
) -> dict[str, Any]:
    """Time what can run a model, in turns, and compare what they say.

    Args:
        source: a folder or a hub id of a classifier.
        engines: of "torch" (float32, and bfloat16 where the hardware has it), "native" (fp32, bf16, int8, or the bits
            of a binary model), "onnx" (ONNX Runtime, fp32) and "openvino" (in the precision that it takes by itself).
        batch: examples per pass.
        tokens: tokens per example.
        seconds: how long to time all of them together.

    Returns:
        For each, under `engines`: `latency_ms` (median, p90, n), `ratio` (milliseconds of the first one over these),
        and of its logits on eight examples `cosine` to those of torch in float32, and `difference`, the largest one
        over the largest logit; and the setting and the machine.

    Raises:
        SecateurError: an unknown engine, or one that cannot run the model.
    """
    if unknown := [name for name in engines if name not in ENGINES]:
        raise SecateurError(f"Engines are {', '.join(ENGINES)}, not '{unknown[0]}'.")
    if not engines:
        raise SecateurError(f"Name at least one engine of {', '.join(ENGINES)}.")
    model = open_any(source).eval()
    inputs, others = dummy_inputs(model, batch, tokens), dummy_inputs(model, PARITY, tokens)
    with tempfile.TemporaryDirectory() as spare, torch.inference_mode():
        wanted: Tensor = model(**others).logits
        runs: dict[str, Runner] = {}
        for name in dict.fromkeys(engines):
            runs |= _runners(name, source, model, Path(spare))
        answers = {name: run(others).double() for name, run in runs.items()}
        passes = {name: partial(run, inputs) for name, run in runs.items()}
        times = sample(passes, seconds, min_runs=10, own_threads=True)
    timings = {name: summarise(found, model, batch, tokens) for name, found in times.items()}
    first = next(iter(timings.values())).median
    rows = {
        name: {
            "latency_ms": {key: getattr(timing, key) for key in ("median", "p90", "n")},
            "ratio": first / timing.median,
            "cosine": float(torch.cosine_similarity(answers[name].flatten(), wanted.double().flatten(), dim=0)),
            "difference": float((answers[name] - wanted).abs().max() / wanted.abs().max()),
        }
        for name, timing in timings.items()
    }
    setting = {"batch": batch, "tokens": tokens, "threads": torch.get_num_threads()}
    return {"engines": rows, **setting, "machine": fingerprint()}


def _runners(name: str, source: str | Path, model: PreTrainedModel, folder: Path) -> dict[str, Runner]:
    """What an engine has to offer, as functions from inputs to logits."""
    if name == "torch":
        found: dict[str, Runner] = {"torch float32": lambda inputs: model(**inputs).logits}
        if bf16_pays():
            half = copy.deepcopy(model).bfloat16()
            found["torch bfloat16"] = lambda inputs: half(**inputs).logits
        return found
    if name == "native":
        fit = (None,) if is_binary(model) else PRECISIONS
        made = [load(model, each) for each in fit]
        return {f"native {engine.precision} ({engine.encoder.tier})": partial(_ragged, engine) for engine in made}
    words = open_tokenizer(source)
    file = export(model, folder / name, name, tokenizer=words) / FORMATS[name].file
    run, names = FORMATS[name].open(file, exact=False), input_names(model, words)
    zeros = torch.zeros_like
    return {name: lambda inputs: run({n: inputs.get(n, zeros(inputs["input_ids"])) for n in names})["logits"]}


def _ragged(engine: Engine, inputs: Mapping[str, Tensor]) -> Tensor:
    ids = inputs["input_ids"]
    return engine.encoded(ids.flatten(), torch.full((len(ids),), ids.shape[1]))
