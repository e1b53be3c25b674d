"""`Binarize`: linear maps with 1-bit weights and inputs of few bits, and attention on operands of few bits."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal, cast, get_args

import torch
from torch import Tensor, nn
from transformers.activations import ACT2CLS, ACT2FN

from secateur.bits.modules import (
    AttentionBits,
    BinaryEmbedding,
    BinaryLinear,
    Quantizer,
    RoundedEmbedding,
    implementation,
    quantizers,
)
from secateur.bits.mpnet import OWN
from secateur.bits.packing import packed, unpacked, words_for
from secateur.bits.quantizers import BITS, Levels, binarized
from secateur.errors import InvalidModel, SecateurError, UnsupportedModel
from secateur.families import Sites, sites
from secateur.sparsity.storage import int8_rows
from secateur.sparsity.weights import base_of, owner_of
from secateur.tokens.attention import with_attention, without_attention

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
        embeddings: the table of words: "float", "int8" with a scale for each row, or "1bit", row-wise.
        rows: a scale of the weights for each output instead of one for the map.
        two_sets: levels from 0 for what a ReLU gives, as for probabilities; else signed ones.
        relu: a ReLU in place of the model's activation in the layers.
    """

    bits: dict[str, int]
    embeddings: Embeddings = "1bit"
    rows: bool = False
    two_sets: bool = True
    relu: bool = True

    type: ClassVar[str] = "binarize"
    changes_shapes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.embeddings not in get_args(Embeddings):
            raise SecateurError(f"embeddings is {' or '.join(get_args(Embeddings))}, not {self.embeddings!r}.")
        switches = (self.rows, self.two_sets, self.relu)
        if not (all(type(switch) is bool for switch in switches) and isinstance(self.bits, dict) and self.bits):
            raise SecateurError("A binary model has the bits of each site; rows, two_sets and relu are true or false.")
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
        found, known = _check(model), places(model)
        if unknown := sorted(site for site in set(self.bits) - set(known) if not site.startswith("pooler.")):
            raise SecateurError(f"The model has no site '{unknown[0]}'; there are such as {known[0]}.")
        table = words_of(model) if self.embeddings != "float" else None
        _plain(model)
        if self.relu:
            _use_relu(found)
        elif not self._reads_relu(model) and _has_relu(found):
            raise SecateurError("The layers have a ReLU in place of their activation already: binarize with relu=True.")
        from_relu = {path_of(model, site.output) for site in found.neurons} if self._reads_relu(model) else set()
        base = base_of(model)[0]
        for name in self.maps_in(model):
            module: Any = base.get_submodule(name)
            self._binarize_map(module, Levels(self.bits[name], not (self.two_sets and name in from_relu)))
        for site in found.heads:
            operands = {name: self.bits.get(f"{site.name}:{name}") for name in OPERANDS}
            if any(operands.values()):
                self._binarize_products(site.module, operands)
        if table is not None:
            table.__class__ = BinaryEmbedding if self.embeddings == "1bit" else RoundedEmbedding

    def maps_in(self, model: nn.Module) -> list[str]:
        """The maps with 1-bit weights that a model has: another head may do without a pooler."""
        modules = dict(base_of(model)[0].named_modules())
        return [name for name in self.maps if name in modules]

    def _reads_relu(self, model: nn.Module) -> bool:
        return self.relu or any(getattr(model.config, key, None) == "relu" for key in ACTIVATION_KEYS)

    def _binarize_map(self, module: nn.Linear, levels: Levels) -> None:
        shift = module.__dict__.pop(_SHIFT, None)
        module.__class__ = BinaryLinear
        module.rows = self.rows  # type: ignore[assignment]
        module.input_bits = Quantizer(levels, module.in_features, module.weight)
        if shift is not None:
            module.input_bits.shift = shift

    def _binarize_products(self, module: Any, operands: Mapping[str, int | None]) -> None:
        if None in operands.values():
            raise SecateurError("Attention has bits for all of query, key, value and probs, or for none.")
        like = next(module.parameters())
        levels = {n: Levels(operands[n] or 1, n != "probs") for n in OPERANDS}  # ±1 would look at padding too
        module.attention_bits = AttentionBits(levels, like)
        if type(module) in OWN:
            module.__class__ = OWN[type(module)]
        else:
            module.config = with_attention(module.config, implementation)

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

    def encode(self, state: dict[str, Tensor], model: nn.Module) -> None:
        """Weights of a model's state dict in the form that is stored, in place.

        Raises:
            SecateurError: a scale of activations is not a number.
        """
        if not all(bool(quantizer.alpha.isfinite()) for quantizer in quantizers(model)):
            raise SecateurError("The activations of this model are not calibrated: call secateur.binarize first.")
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

    def checksums(self, state: Mapping[str, Tensor], model: nn.Module) -> dict[str, str]:
        """By name in the base model: dtype and hash of all that is stored of the binary part."""
        prefix = base_of(model)[1]
        names = [name for key in self._keys(model) for name in (key, f"{key}_scale")]
        names += [key for key in state if key.endswith((".alpha", ".shift")) and "_bits." in key]
        return {name.removeprefix(prefix): checksum(state[name]) for name in names}

    def weights(self, model: nn.Module) -> list[str]:
        """Names, in the whole model, of the weights that are stored in another form."""
        return list(self._keys(model))

    def _stored(self, model: nn.Module) -> Iterator[tuple[nn.Module, str, bool, str]]:
        """Module, name of its weight, whether it has a scale for each row, and "bits" or "int8"."""
        for name in self.maps_in(model):
            yield *owner_of(model, f"{name}.weight"), self.rows, "bits"
        if self.embeddings != "float":
            yield words_of(model), "weight", True, "bits" if self.embeddings == "1bit" else "int8"

    def _keys(self, model: nn.Module) -> dict[str, tuple[bool, str]]:
        """By the name of a weight in the whole model: whether it has a scale for each row, and how it is stored."""
        names = {module: name for name, module in model.named_modules()}
        return {f"{names[owner]}.{key}": (rows, kind) for owner, key, rows, kind in self._stored(model)}


_SHAPE = "_secateur_shape"
_SHIFT = "_secateur_shift"


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


def _use_relu(found: Sites) -> None:
    """Put a ReLU behind the map into the neurons of each layer, in place; heads keep their activations."""
    listed = {entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values()}
    usual = cast(tuple[type, ...], tuple(listed - {ACT2CLS["linear"]}))
    for site in found.neurons:
        for parent in list(site.layer_module.modules()):
            for name, child in parent.named_children():
                if isinstance(child, usual):
                    setattr(parent, name, ACT2FN["relu"])


def _has_relu(found: Sites) -> bool:
    kind = type(ACT2FN["relu"])
    return any(isinstance(module, kind) for site in found.neurons for module in site.layer_module.modules())


def _plain(model: nn.Module) -> None:
    """Take all quantisers out of a model, in place; shifts wait for the next ones. A ReLU stays."""
    own = {bits: usual for usual, bits in OWN.items()}
    for module in list(model.modules()):
        if isinstance(module, BinaryLinear):
            module.__dict__[_SHIFT] = module.input_bits.shift
            module.__class__ = nn.Linear  # type: ignore[assignment]
            del module.input_bits, module.rows
        elif isinstance(module, (BinaryEmbedding, RoundedEmbedding)):
            module.__class__ = nn.Embedding  # type: ignore[assignment]
        elif isinstance(getattr(module, "attention_bits", None), AttentionBits):
            del module.attention_bits
            if type(module) in own:
                module.__class__ = own[type(module)]
            else:
                module.config = without_attention(module.config, implementation)


def checksum(tensor: Tensor) -> str:
    """Dtype and hash of a tensor's bytes."""
    data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return f"{str(tensor.dtype).removeprefix('torch.')} {hashlib.sha256(data).hexdigest()[:32]}"


def _check(model: nn.Module) -> Sites:
    found = sites(model)
    if getattr(getattr(model, "config", None), "is_decoder", False):
        raise UnsupportedModel(
            "This model is used as a decoder, and 1-bit attention looks both ways: binarize encoders."
        )
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
