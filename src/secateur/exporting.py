"""Export a dense or sliced model to ONNX or OpenVINO, and keep the files only if they compute what the model computes.

The conversion is `transformers.exporters`; this module chooses the inputs, lets batch and length vary, reopens the
written file with the runtime a user would open it with, and compares it with the torch model at shapes the conversion
never saw.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.util
import inspect
import io
import json
import logging
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from secateur import hub
from secateur.bits.modules import plain_tables
from secateur.edits.tokens import dial_of, has_dial, turned_to
from secateur.errors import InvalidModel, MissingExtra, SecateurError, UnsupportedModel
from secateur.families import family_of
from secateur.tokens.handover import is_causal

CHECK_FILE = "check.json"
EXAMPLE = (2, 8)
"""Batch and tokens of the example that is traced; a size of 1 would be taken for a constant."""
CHECKS = ((1, 1), (1, 7), (3, 33), (5, 16), (2, 512))
"""Batch and tokens at which the export is compared; lengths above the model's longest input are shortened to it."""
FLAGS = {"use_cache": False, "output_hidden_states": False, "output_attentions": False}

Run = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
"""From named inputs to named outputs, as the opened file computes them."""


@dataclass(frozen=True)
class Format:
    """One export format.

    Attributes:
        packages: modules that must be importable; the extra of the same name installs them.
        exporter, config: names of the classes in `transformers.exporters`.
        file: the graph's file name inside the exported folder.
        runtime: distribution whose version goes into the record.
        open: opens the written file.
    """

    packages: tuple[str, ...]
    exporter: str
    config: str
    file: str
    runtime: str
    open: Callable[..., Run]


def export(
    folder_or_model: str | Path | nn.Module,
    out: str | Path | None = None,
    format: str = "onnx",
    tokenizer: Any = None,
    tolerance: float = 1e-4,
    speedup: float | None = None,
) -> Path:
    """Write a model as ONNX or OpenVINO with dynamic batch and length, after checking that it computes the same.

    Args:
        folder_or_model: a model folder (or hub id), or a float32 transformers model; it may be sliced.
        out: folder to write; default `<folder>/<format>`. An earlier export there is replaced, anything else is left
            alone.
        format: `"onnx"` or `"openvino"`.
        tokenizer: the model's tokenizer or its folder, saved beside the graph; default the one in the model folder. Its
            `model_input_names` become the graph's inputs.
        tolerance: largest absolute difference allowed between any output of the file and of the torch model.
        speedup: where to turn the model's dial for it; None leaves it where it stands. The file then drops as many
            tokens for good: ONNX of encoders only.

    Returns:
        The folder, with `model.onnx` or `openvino_model.xml`, the config, the tokenizer, and the measured differences
        in `check.json`. It opens without secateur.

    Raises:
        MissingExtra: the packages of the format are not installed.
        InvalidModel: the model cannot be opened, or is not float32.
        UnsupportedModel: the model is an encoder-decoder.
        SecateurError: a latency dial is turned in a decoder or for OpenVINO, the conversion fails, the result differs
            by more than `tolerance`, or `out` holds something else.
    """
    chosen = _format(format)
    target = _target(folder_or_model, out, format)
    model, tokenizer = _open(folder_or_model, tokenizer)
    names = input_names(model, tokenizer)

    def write(fresh: Path) -> None:
        _convert(model, names, chosen, format, fresh)
        found = compare(model, chosen.open(fresh / chosen.file), names, tolerance)
        runtime = f"{chosen.runtime} {version(chosen.runtime)}"
        record = {"format": format, "runtime": runtime, "tolerance": tolerance, **found}
        (fresh / CHECK_FILE).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        _save_companions(folder_or_model, tokenizer, fresh)

    with _inference(model), turned_to(model, speedup), plain_tables(model):
        _check_exportable(model, format)
        return hub.save_folder(target, write)


def input_names(model: nn.Module, tokenizer: Any = None) -> tuple[str, ...]:
    """Inputs of the graph: what the tokenizer makes and the model reads, or what the config implies without one."""
    main = str(getattr(model, "main_input_name", "input_ids"))
    if main != "input_ids":
        return (main,)
    readable = inspect.signature(type(model).forward).parameters
    config: Any = model.config
    if tokenizer is not None:
        wanted = list(tokenizer.model_input_names)
    else:
        wanted = ["input_ids", "attention_mask"]
        if (getattr(config, "type_vocab_size", 0) or 0) > 1:
            wanted.append("token_type_ids")
    return tuple(name for name in wanted if name in readable)


def example_inputs(
    model: nn.Module, names: tuple[str, ...], batch: int, tokens: int, seed: int = 0
) -> dict[str, Tensor]:
    """Random inputs whose rows have different lengths.

    Returns:
        For text, int64 tensors of shape (batch, tokens), rows padded on the right from `tokens` down to half of it; for
        images, `pixel_values` of shape (batch, channels, height, width).
    """
    config: Any = model.config
    device = next(model.parameters()).device
    random = torch.Generator().manual_seed(seed)
    if names == ("pixel_values",):
        size = config.image_size
        height, width = (size, size) if isinstance(size, int) else size
        return {"pixel_values": torch.randn(batch, config.num_channels, height, width, generator=random).to(device)}
    lengths = torch.linspace(tokens, max(1, tokens // 2), batch).long()
    attention = (torch.arange(tokens) < lengths[:, None]).long()
    pad = config.pad_token_id if getattr(config, "pad_token_id", None) is not None else 0
    ids = torch.randint(config.vocab_size - 1, (batch, tokens), generator=random)
    ids = torch.where(attention.bool(), ids + (ids >= pad), pad)  # the pad id never stands for a real token
    kinds = torch.randint(max(1, getattr(config, "type_vocab_size", 1) or 1), (batch, tokens), generator=random)
    made = {"input_ids": ids, "attention_mask": attention, "token_type_ids": kinds * attention}
    unknown = sorted(set(names) - set(made))
    if unknown:
        raise UnsupportedModel(
            f"{type(model).__name__} reads {', '.join(unknown)}: only token and image inputs are exported."
        )
    return {name: made[name].to(device) for name in names}


def longest_input(model: nn.Module) -> int:
    """Tokens that the model surely reads, at most 512: RoBERTa-like models count positions from `pad_token_id` + 1."""
    config: Any = model.config
    positions = getattr(config, "max_position_embeddings", None)
    if not positions or positions < 0:
        return 512
    return max(1, min(512, positions - (getattr(config, "pad_token_id", None) or 0) - 1))


def compare(model: nn.Module, run: Run, names: tuple[str, ...], tolerance: float) -> dict[str, Any]:
    """Largest absolute difference between an opened export and the model, over `CHECKS`.

    Returns:
        `{"max_abs_difference", "outputs": [names], "checks": [{"batch", "tokens", "max_abs_difference"}]}`; `tokens` is
        None for images.

    Raises:
        SecateurError: a difference is above `tolerance` or not finite, or no output could be compared.
    """
    text = "input_ids" in names
    longest = longest_input(model) if text else 0
    shapes = dict.fromkeys((batch, min(tokens, longest)) for batch, tokens in CHECKS)
    compared: set[str] = set()
    checks: list[dict[str, Any]] = []
    for seed, (batch, tokens) in enumerate(shapes, start=1):
        inputs = example_inputs(model, names, batch, tokens, seed)
        with torch.inference_mode():
            expected = model(**inputs, **_flags(model), return_dict=True)
        found = {name: value for name, value in run(inputs).items() if isinstance(expected.get(name), Tensor)}
        difference = max((_difference(value, expected[name]) for name, value in found.items()), default=float("nan"))
        shape = f"batch {batch}" + (f", {tokens} tokens" if text else "")
        if not difference <= tolerance:
            raise SecateurError(
                f"The exported file differs from the model by {difference:.2g} at {shape}, more than {tolerance:g}: "
                "nothing was written. Try other versions of the exporter's packages."
            )
        compared |= set(found)
        checks.append({"batch": batch, "tokens": tokens if text else None, "max_abs_difference": difference})
    worst = max(check["max_abs_difference"] for check in checks)
    return {"max_abs_difference": worst, "outputs": sorted(compared), "checks": checks}


def _difference(found: Tensor, expected: Tensor) -> float:
    if found.shape != expected.shape:
        return float("inf")
    return float((found.double() - expected.cpu().double()).abs().max())


def _open_onnx(path: Path, *, exact: bool = True) -> Run:
    runtime = importlib.import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = [port.name for port in session.get_inputs()]
    outputs = [port.name for port in session.get_outputs()]

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = session.run(outputs, {name: tensors[name].cpu().numpy() for name in inputs})
        return {name: torch.from_numpy(value) for name, value in zip(outputs, values, strict=True)}

    return run


def _open_openvino(path: Path, *, exact: bool = True) -> Run:
    options: dict[str, Any] = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY"}
    if exact:  # by default it computes in bfloat16 where the processor can
        options["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = importlib.import_module("openvino").Core().compile_model(str(path), "CPU", options)
    inputs = [port.get_any_name() for port in compiled.inputs]

    def run(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        values = compiled({name: tensors[name].cpu().numpy() for name in inputs})
        return {port.get_any_name(): torch.from_numpy(values[port].copy()) for port in compiled.outputs}

    return run


FORMATS: dict[str, Format] = {
    "onnx": Format(
        ("onnx", "onnxscript", "onnxruntime"), "OnnxExporter", "OnnxConfig", "model.onnx", "onnxruntime", _open_onnx
    ),
    "openvino": Format(
        ("openvino",), "OpenVINOExporter", "OpenVINOConfig", "openvino_model.xml", "openvino", _open_openvino
    ),
}


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise SecateurError(f"Unknown export format '{name}': use {' or '.join(FORMATS)}.")
    missing = [package for package in FORMATS[name].packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtra(
            f"Export to {name} needs {', '.join(missing)}: run `pip install secateur[{name}]`, in a checkout "
            f"`pip install '.[{name}]'`."
        )
    return FORMATS[name]


def _target(source: str | Path | nn.Module, out: str | Path | None, format: str) -> Path:
    """The folder to write, absolute; refuses to replace anything but an earlier export or an empty folder."""
    if out is None:
        if isinstance(source, nn.Module) or not Path(source).is_dir():
            raise SecateurError("Exporting a live model or a hub id needs a folder to write: pass out=.")
        out = Path(source) / format
    target = Path(out).expanduser().absolute()
    occupied = target.exists() and not (target.is_dir() and not any(target.iterdir()))
    if occupied and not (target / CHECK_FILE).is_file():
        raise SecateurError(f"'{target}' exists and is not an earlier export: choose another folder.")
    return target


def _open(source: str | Path | nn.Module, tokenizer: Any) -> tuple[nn.Module, Any]:
    """The model, from a folder in float32, and its tokenizer if it has one."""
    model = source if isinstance(source, nn.Module) else hub.open_any(source)
    if tokenizer is None and not isinstance(source, nn.Module):
        folder = Path(source)
        text = getattr(model, "main_input_name", "input_ids") == "input_ids"
        if text and (not folder.is_dir() or (folder / "tokenizer_config.json").is_file()):
            tokenizer = source
    return model, hub.open_tokenizer(tokenizer) if isinstance(tokenizer, str | Path) else tokenizer


def _check_exportable(model: nn.Module, format: str) -> None:
    family = family_of(model)
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModel(f"Export covers encoders: a '{family.name}' model needs one graph per generation step.")
    if has_dial(model) and dial_of(model).alpha > 0 and (is_causal(model) or format != "onnx"):
        raise SecateurError(
            f"This model's dial stands at a speed-up of {dial_of(model).speedup:.3g}; of decoders, and for OpenVINO, "
            "only the dense model can be exported: use speedup=1 (--speedup 1), or ONNX for an encoder."
        )
    dtypes = {parameter.dtype for parameter in model.parameters()}
    if dtypes != {torch.float32}:
        found = ", ".join(sorted(str(dtype).removeprefix("torch.") for dtype in dtypes))
        raise InvalidModel(f"The model to export must be float32, not {found}: call model.to(torch.float32) first.")


def _flags(model: nn.Module) -> dict[str, bool]:
    """Switches that keep the outputs to plain tensors, as far as the model takes them."""
    readable = inspect.signature(type(model).forward).parameters
    accepts_any = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in readable.values())
    return {name: value for name, value in FLAGS.items() if name in readable or (accepts_any and name != "use_cache")}


def _convert(model: nn.Module, names: tuple[str, ...], chosen: Format, format: str, folder: Path) -> None:
    """Trace the model and write graph, weights and config; the config loses the edits: the graph already has them."""
    exporters = importlib.import_module("transformers.exporters")
    dynamic = torch.export.Dim.DYNAMIC
    axes = {0: dynamic, 1: dynamic} if "input_ids" in names else {0: dynamic}
    batch, tokens = EXAMPLE
    inputs = example_inputs(model, names, batch, min(tokens, longest_input(model)))
    settings = getattr(exporters, chosen.config)(dynamic=True, dynamic_shapes=dict.fromkeys(names, axes))
    own_forward = "forward" in vars(model)
    try:
        with _quiet():
            exporter = getattr(exporters, chosen.exporter)()
            exported = exporter.export(model, {**inputs, **_flags(model)}, settings)
            exported.config = copy.deepcopy(model.config)
            vars(exported.config).pop("quantization_config", None)
            exported.save_pretrained(folder)
    except Exception as error:  # the converters raise anything, from ImportError to their own C++ errors
        reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise SecateurError(f"{type(model).__name__} cannot be converted to {format}: {reason[:300]}") from error
    finally:
        if not own_forward:
            vars(model).pop("forward", None)  # the exporter leaves a bound copy on the instance


def _save_companions(source: str | Path | nn.Module, tokenizer: Any, folder: Path) -> None:
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    if not isinstance(source, nn.Module):
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (Path(source) / name).is_file():
                shutil.copyfile(Path(source) / name, folder / name)


@contextlib.contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, each module's own mode restored afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back the converters' progress lines, which would end up in the command line's JSON, and their warnings."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
