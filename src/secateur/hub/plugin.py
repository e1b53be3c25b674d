"""The transformers plug-in: edits in `config.json`, weights in the form that edits store them in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import safe_open
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from secateur.edits import STORED, Binarize, Edit, Sparsify, apply_edits, edits_from_dicts, merge
from secateur.edits.binarize import checksum
from secateur.edits.tokens import ATTRIBUTE
from secateur.errors import InvalidModel
from secateur.families import sites

QUANT_METHOD = "secateur"
FORMAT_VERSION = 1
_DIGEST = "secateur_edits"
_CHECKSUM = "secateur_bits"


@register_quantization_config(QUANT_METHOD)
class SecateurConfig(QuantizationConfigMixin):
    """The block that secateur writes into `config.json`.

    Args:
        version: format of the block; other versions are refused.
        edits: the edits in order, as dictionaries.

    Raises:
        InvalidModel: an unknown version, key or edit.
    """

    def __init__(
        self, version: int = 0, edits: object = None, quant_method: str = QUANT_METHOD, **unknown: object
    ) -> None:
        if version != FORMAT_VERSION:
            raise InvalidModel(
                f"config.json: secateur format version {version!r} is not {FORMAT_VERSION}: install the "
                f"secateur that wrote it."
            )
        if unknown:
            raise InvalidModel(f"config.json: unknown keys {sorted(unknown)} in the secateur block: upgrade secateur.")
        self.quant_method = quant_method  # type: ignore[assignment]
        self.version = version
        self.edits: list[Edit] = edits_from_dicts(edits)

    def to_dict(self) -> dict[str, Any]:
        return {
            "quant_method": QUANT_METHOD,
            "version": self.version,
            "edits": [edit.to_dict() for edit in self.edits],
        }

    def to_diff_dict(self) -> dict[str, Any]:
        return self.to_dict()

    @property
    def digest(self) -> str:
        """Hash of the edits, stored beside the weights so that a changed config is noticed."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()


@register_quantizer(QUANT_METHOD)
class SecateurQuantizer(HfQuantizer):
    """Shapes the empty model by its edits before transformers reads the weights."""

    quantization_config: SecateurConfig
    _reading = False  # whether weights that `save_pretrained` wrote for this plug-in are being read

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        self._checksums: dict[str, str] = {}
        self._found: dict[str, str] = {}
        stored = [self._check_digest(Path(file)) for file in kwargs.get("checkpoint_files") or ()]
        self._reading = any(stored)  # weights that something else wrote beside these edits carry no guard
        if self._reading and any(isinstance(edit, Binarize) for edit in self._storing()):
            self._check_bits()
        apply_edits(model, self.quantization_config.edits, empty=True)
        if self._reading and self._guarded():
            owner, name = guarded_parameter(model)
            _reshape(owner, name, lambda weight: weight[None])
        if self._reading:
            for edit in self._storing():
                edit.shape_for_reading(model)
        return model

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        if self._guarded():
            owner, name = guarded_parameter(model)
            if self._reading:
                _reshape(owner, name, lambda weight: weight[0])
            model.register_load_state_dict_pre_hook(_unguard)
        for edit in self._storing():
            if self._reading:
                edit.restore(model, cast(PreTrainedModel, model).dtype)
            model.register_load_state_dict_pre_hook(_densify)
        self._reading = False
        return model

    def _storing(self) -> list[Sparsify | Binarize]:
        return [edit for edit in self.quantization_config.edits if isinstance(edit, STORED)]

    def _guarded(self) -> bool:
        return not any(edit.changes_shapes for edit in self.quantization_config.edits)

    def _check_digest(self, file: Path) -> bool:
        """Return whether the file was written for this plug-in."""
        if file.suffix != ".safetensors":
            raise InvalidModel(f"{file.name} is not a safetensors file: secateur opens no pickled weights.")
        with safe_open(file, framework="pt") as weights:
            metadata = weights.metadata() or {}
            wanted = json.loads(metadata.get(_CHECKSUM, "{}"))
            for key in weights.keys() if wanted else ():
                name = key if key in wanted else key.partition(".")[2]  # with or without the base model's name
                self._found[name] = checksum(weights.get_tensor(key))
        self._checksums |= wanted
        stored = metadata.get(_DIGEST)
        if stored is not None and stored != self.quantization_config.digest:
            raise InvalidModel(
                f"The edits in config.json are not those {file.name} was saved with: restore config.json or "
                f"compress again."
            )
        return stored is not None

    def _check_bits(self) -> None:
        """Compare the binary part, as it is stored, with what was written; some families store it by other names."""
        there = set(self._found.values())
        damaged = None if self._checksums else "checksum"
        for name, wanted in self._checksums.items():
            if self._found.get(name, wanted) != wanted or wanted not in there:
                damaged = name
                break
        if damaged is not None:
            raise InvalidModel(f"'{damaged}' is not what the model was saved with: the file is damaged.")

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any] | None, dict[str, str]]:
        self.quantization_config.edits = edits_of(model)
        state = None
        if self._guarded():
            state = model.state_dict()
            key = _guarded_key(model)
            state[key] = state[key][None]
        for edit in self._storing():
            state = model.state_dict() if state is None else state
            edit.encode(state, model)
        metadata = {_DIGEST: self.quantization_config.digest}
        for edit in self._storing():
            if isinstance(edit, Binarize) and state is not None:
                metadata[_CHECKSUM] = json.dumps(edit.checksums(state, model))
        return state, metadata

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """A sliced model is an ordinary dense model: `Trainer` may train all of it."""
        return True


def edits_of(model: nn.Module) -> list[Edit]:
    """The edits a model carries, in order; empty for a model that secateur did not change."""
    config = getattr(getattr(model, "config", None), "quantization_config", None)
    return [edit.present(model) for edit in config.edits] if isinstance(config, SecateurConfig) else []


def carry_edits(source: nn.Module, target: nn.Module) -> None:
    """Let a model with the same body as another save its edits, and turn its dial."""
    for name in ("hf_quantizer", "is_quantized", "quantization_method", ATTRIBUTE):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))
    if edits_of(target):
        target.register_load_state_dict_pre_hook(_unguard)
        target.register_load_state_dict_pre_hook(_densify)


def guarded_parameter(model: nn.Module) -> tuple[nn.Module, str]:
    """The parameter that is stored with one axis too many when no edit changes a shape, and the module it is in.

    transformers only warns of an unknown plug-in; a shape that does not fit stops it.
    """
    layer = sites(model).neurons[0].layer_module
    path, _, name = next(name for name, _ in layer.named_parameters()).rpartition(".")
    return layer.get_submodule(path), name


def _guarded_key(model: nn.Module) -> str:
    owner, name = guarded_parameter(model)
    return next(key for key, p in model.named_parameters() if p is getattr(owner, name))


def _reshape(owner: nn.Module, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    old = getattr(owner, name)
    setattr(owner, name, nn.Parameter(change(old.detach()), requires_grad=old.requires_grad))


def _unguard(model: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before `load_state_dict`, as a resumed `Trainer` calls it on what `save_pretrained` wrote."""
    key = prefix + _guarded_key(model)
    if key in state and state[key].dim() > getattr(*guarded_parameter(model)).dim():
        state[key] = state[key][0]


def _densify(model: nn.Module, state: dict[str, Any], prefix: str, *args: Any) -> None:
    """Before `load_state_dict`, as a resumed `Trainer` calls it on what `save_pretrained` wrote."""
    for edit in edits_of(model):
        if isinstance(edit, STORED):
            edit.decode(state, model, prefix)


def attach(model: PreTrainedModel, edits: Sequence[Edit]) -> None:
    """Record edits that were just applied, after those the model carries, so that `save_pretrained` writes them."""
    merged = merge([*edits_of(model), *edits])
    config = SecateurConfig(FORMAT_VERSION, [edit.to_dict() for edit in merged])
    quantizer = SecateurQuantizer(config)
    model.hf_quantizer = quantizer  # type: ignore[assignment]
    quantizer.postprocess_model(model)
    model.is_quantized = True  # type: ignore[assignment]
    model.quantization_method = QUANT_METHOD  # type: ignore[assignment]
