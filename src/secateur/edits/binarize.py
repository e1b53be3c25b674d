"""`Binarize`: linear maps with 1-bit weights and inputs of few bits, and attention on operands of few bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.mpnet.modeling_mpnet import MPNetSelfAttention

from secateur.bits.modules import AttentionBits, BinaryEmbedding, BinaryLinear, Quantizer, implementation, quantizers
from secateur.bits.mpnet import MPNetBits
from secateur.bits.packing import packed, unpacked, words_for
from secateur.bits.quantizers import BITS, Levels, binarized
from secateur.errors import InvalidModel, SecateurError, UnsupportedModel
from secateur.families import sites
from secateur.sparsity.storage import int8_rows
from secateur.sparsity.weights import base_of, owner_of
from secateur.tokens.attention import AttentionConfig

Embeddings = Literal["float", "int8", "1bit"]
OPERANDS = ("query", "key", "value", "probs")
ACTIVATION_KEYS = ("hidden_act", "activation")


@dataclass(frozen=True)
class Binarize:
    """Binarize maps and attention products; a model opens with weights ±s, and `save_pretrained` writes bits.

    Attributes:
        bits: by site, bits of an activation. A site is a map, "encoder.layer.0.output.dense", whose input it is and
            whose weights get one bit, or an operand of attention, "encoder.layer.0.attention.self:probs" (also
            ":query", ":key", ":value"). What is not named stays as it is.
        embeddings: how the table of words is stored: "float", "int8" with a scale for each row, or "1bit", row-wise,
            which the model computes with.
        rows: a scale of the weights for each output instead of one for the map.
        two_sets: levels from 0 for what is never negative (probabilities, what a ReLU gives); else signed everywhere.
    """

    bits: dict[str, int]
    embeddings: Embeddings = "1bit"
    rows: bool = False
    two_sets: bool = True

    type: ClassVar[str] = "binarize"
    changes_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.embeddings not in get_args(Embeddings):
            raise SecateurError(f"embeddings is {' or '.join(get_args(Embeddings))}, not {self.embeddings!r}.")
        if not (type(self.rows) is bool and type(self.two_sets) is bool and isinstance(self.bits, dict) and self.bits):
            raise SecateurError("A binary model has the bits of each site; rows and two_sets are true or false.")
        for site, count in self.bits.items():
            if type(count) is not int or count not in BITS:
                raise SecateurError(f"'{site}' has 1, 2, 4 or 8 bits, not {count!r}.")

    @property
    def maps(self) -> list[str]:
        """The maps with 1-bit weights."""
        return [site for site in self.bits if ":" not in site]

    def apply(self, model: nn.Module, *, empty: bool = False) -> None:
        """Put quantisers into a model, in place; their scales are to be calibrated (`calibrate`) or read.

        A model that is binary already gets new quantisers, and keeps weights and shifts.

        Raises:
            UnsupportedModel: a family whose maps or attention cannot be binarized.
            SecateurError: a site that the model does not have.
        """
        found = _check(model)
        unknown = sorted(set(self.bits) - set(places(model)))
        if unknown:
            raise SecateurError(f"The model has no site '{unknown[0]}'; there are such as {next(iter(places(model)))}.")
        from_relu = {f"{path_of(model, site.output)}" for site in found.neurons} if _has_relu(model) else set()
        base = base_of(model)[0]
        for name in self.maps:
            module: Any = base.get_submodule(name)
            self._binarize_map(module, Levels(self.bits[name], not (self.two_sets and name in from_relu)))
        for site in found.heads:
            operands = {name: self.bits.get(f"{site.name}:{name}") for name in OPERANDS}
            if any(operands.values()):
                self._binarize_products(site.module, operands)
        if self.embeddings == "1bit":
            words_of(model).__class__ = BinaryEmbedding

    def _binarize_map(self, module: nn.Linear, levels: Levels) -> None:
        old = getattr(module, "input_bits", None)
        module.__class__ = BinaryLinear
        module.rows = self.rows  # type: ignore[assignment]
        module.input_bits = Quantizer(levels, module.in_features, module.weight)
        if old is not None:
            module.input_bits.shift = old.shift

    def _binarize_products(self, module: Any, operands: Mapping[str, int | None]) -> None:
        if None in operands.values():
            raise SecateurError("Attention has bits for all of query, key, value and probs, or for none.")
        signed = {name: not (self.two_sets and name == "probs") for name in OPERANDS}
        like = next(module.parameters())
        module.attention_bits = AttentionBits({n: Levels(operands[n] or 1, signed[n]) for n in OPERANDS}, like)
        if isinstance(module, MPNetSelfAttention):
            module.__class__ = MPNetBits
        elif not isinstance(module.config, AttentionConfig):
            module.config = AttentionConfig(module.config, implementation)

    def present(self, model: nn.Module) -> Binarize:
        """The edit itself: levels do not change by themselves."""
        return self

    def to_dict(self) -> dict[str, Any]:
        return {"type": self.type, **asdict(self)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Binarize:
        """Inverse of `to_dict`.

        Raises:
            InvalidModel: unknown or missing keys, or values that cannot be read.
        """
        values = {key: value for key, value in data.items() if key != "type"}
        if wrong := sorted(set(values) ^ {f.name for f in fields(cls)}):
            raise InvalidModel(f"config.json: the binarize edit has unknown or missing keys: {', '.join(wrong)}.")
        try:
            return cls(**values)
        except (SecateurError, TypeError) as error:
            raise InvalidModel(f"config.json: the binarize edit cannot be read: {error}") from None

    @torch.no_grad()
    def settle(self, model: nn.Module) -> None:
        """Round a table of words that is stored in bytes to what will be stored."""
        if self.embeddings == "int8":
            table = words_of(model).weight
            table.copy_(_dense(*int8_rows(table), (table.shape[0], table.shape[1])))

    # --- storage ------------------------------------------------------------------------------------------------

    def shape_for_reading(self, model: nn.Module) -> None:
        """Before weights are read: each weight takes the shape of what is stored, and gets a place for its scale."""
        for owner, key, rows, kind in self._stored(model):
            weight = getattr(owner, key)
            out, inputs = weight.shape
            owner.__dict__[_SHAPE] = (out, inputs)
            shape, dtype = ((out, inputs), torch.int8) if kind == "int8" else ((out, words_for(inputs)), torch.int64)
            place = torch.empty(shape, dtype=dtype, device=weight.device)
            setattr(owner, key, nn.Parameter(place, requires_grad=False))
            scale = torch.empty((out,) if rows else (), dtype=torch.float32, device=weight.device)
            owner.register_buffer(f"{key}_scale", scale)

    def restore(self, model: nn.Module, dtype: torch.dtype) -> None:
        """After weights were read: each is ±s, or a row's scale times a whole number."""
        for owner, key, _, _ in self._stored(model):
            parts = getattr(owner, key).detach(), getattr(owner, f"{key}_scale")
            delattr(owner, f"{key}_scale")
            setattr(owner, key, nn.Parameter(_dense(*parts, owner.__dict__.pop(_SHAPE)).to(dtype)))
        if not all(bool(quantizer.alpha.isfinite()) for quantizer in quantizers(model)):
            raise InvalidModel("The model was saved before its activations were calibrated: calibrate, then save.")

    def encode(self, state: dict[str, Tensor], model: nn.Module) -> None:
        """Weights of a model's state dict in the form that is stored, in place."""
        for key, (rows, kind) in self._keys(model).items():
            weight = state[key].detach()
            state[key], state[f"{key}_scale"] = int8_rows(weight) if kind == "int8" else _bits(weight, rows)

    def decode(self, state: dict[str, Tensor], model: nn.Module, prefix: str = "") -> None:
        """Inverse of `encode` on what was stored, in place; dense weights stay."""
        shapes = {key: tensor.shape for key, tensor in model.state_dict(keep_vars=True).items()}
        for key in self._keys(model):
            if f"{prefix}{key}_scale" in state:
                shape = (shapes[key][0], shapes[key][1])
                state[prefix + key] = _dense(state[prefix + key], state.pop(f"{prefix}{key}_scale"), shape)

    def checksum(self, state: Mapping[str, Tensor], model: nn.Module) -> str:
        """SHA-256 of all words of bits (or bytes) that are stored."""
        digest = hashlib.sha256()
        for name in sorted(self._keys(model)):
            digest.update(name.encode())
            digest.update(state[name].detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def weights(self, model: nn.Module) -> list[str]:
        """Names, in the whole model, of the weights that are stored in another form."""
        return list(self._keys(model))

    def _stored(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, bool, str]]:
        """Module, name of its weight, whether it has a scale for each row, and "bits" or "int8"."""
        for name in self.maps:
            yield *owner_of(model, f"{name}.weight"), self.rows, "bits"
        if self.embeddings != "float":
            yield words_of(model), "weight", True, "bits" if self.embeddings == "1bit" else "int8"

    def _keys(self, model: nn.Module) -> dict[str, tuple[bool, str]]:
        """By the name of a weight in the whole model: whether it has a scale for each row, and how it is stored."""
        names = {module: name for name, module in model.named_modules()}
        return {f"{names[owner]}.{key}": (rows, kind) for owner, key, rows, kind in self._stored(model)}


_SHAPE = "_secateur_shape"


def places(model: nn.Module) -> list[str]:
    """All sites of a model that may be binarized: maps of the layers and of a pooler, operands of attention."""
    found = _check(model)
    names = []
    for site in found:
        if not site.units:  # a layer that lost all of them
            continue
        names += [path_of(model, module) for module, _ in site.cuts]
        if site.kind == "heads":
            names += [f"{site.name}:{operand}" for operand in OPERANDS]
    base = base_of(model)[0]
    pooler = getattr(base, "pooler", None)
    names += (
        [f"pooler.{name}" for name, module in pooler.named_modules() if isinstance(module, nn.Linear)]
        if pooler is not None
        else []
    )
    return names


def path_of(model: nn.Module, module: nn.Module) -> str:
    """A module's name in the base model."""
    return next(name for name, found in base_of(model)[0].named_modules() if found is module)


def words_of(model: nn.Module) -> nn.Embedding:
    """The table of words.

    Raises:
        UnsupportedModel: there is none, or the head uses it too.
    """
    table = model.get_input_embeddings()  # type: ignore[operator]
    if not isinstance(table, nn.Embedding):
        raise UnsupportedModel("This model reads no words: leave its embeddings 'float'.")
    head = model.get_output_embeddings()  # type: ignore[operator]
    if head is not None and head.weight is table.weight:
        raise UnsupportedModel("The head of this model shares the table of words: leave the embeddings 'float'.")
    return table


def use_relu(model: nn.Module) -> None:
    """Put a ReLU behind the map into the neurons of each layer, in place and in the config."""
    config: Any = model.config
    key = _activation_key(model)
    usual = type(ACT2FN[getattr(config, key)])
    for site in _check(model).neurons:
        for parent in list(site.layer_module.modules()):
            for name, child in parent.named_children():
                if type(child) is usual:
                    setattr(parent, name, ACT2FN["relu"])
    setattr(config, key, "relu")


def _has_relu(model: nn.Module) -> bool:
    return bool(getattr(model.config, _activation_key(model)) == "relu")


def _activation_key(model: nn.Module) -> str:
    found = next((key for key in ACTIVATION_KEYS if isinstance(getattr(model.config, key, None), str)), None)
    if found is None:
        raise UnsupportedModel("The config of this model does not name its activation.")
    return found


def _check(model: nn.Module) -> Any:
    found = sites(model)
    if hasattr(model, "secateur"):
        raise SecateurError("This model eliminates tokens, which 1-bit attention cannot do: binarize another one.")
    if not found.family.plain_products:
        raise UnsupportedModel(
            f"{found.family.name} cannot be binarized: its attention is more than products of queries, keys and values."
        )
    return found


def _bits(weight: Tensor, rows: bool) -> tuple[Tensor, Tensor]:
    signs, scale = binarized(weight, rows=rows)
    return packed(signs > 0), scale.float()


def _dense(stored: Tensor, scale: Tensor, shape: tuple[int, int]) -> Tensor:
    """Inverse of `int8_rows` and `_bits`, in float32."""
    values = stored.float() if stored.dtype == torch.int8 else unpacked(stored, shape[1]).float() * 2 - 1
    return values * (scale[:, None] if scale.dim() else scale)
