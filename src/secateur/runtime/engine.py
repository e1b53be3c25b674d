"""An engine: an encoder folder for inference alone, on ragged batches without padding."""

from __future__ import annotations

import ctypes
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.errors import InvalidData, SecateurError
from secateur.hub import open_any, open_tokenizer
from secateur.runtime.build import TIERS, NoCompiler, library
from secateur.runtime.plan import Affine, Head, LayerPlan, Plan, plan_of
from secateur.tasks.batching import token_limit

Precision = Literal["fp32", "bf16", "int8"]
TIER = "SECATEUR_TIER"
"""Environment variable that forces a tier of instructions, or "torch"."""
_ACTIVATIONS = {"gelu": 1, "relu": 2, "gelu_tanh": 3}

Text = str | tuple[str, str]
Batch = Sequence[Text] | Sequence[Sequence[int]]


def load(
    source: str | Path | PreTrainedModel,
    precision: Precision = "int8",
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    threads: int | None = None,
    tier: str | None = None,
) -> Engine:
    """Make an engine of a classifier.

    Args:
        source: a folder, a hub id, or a live model.
        precision: of products: "fp32"; "bf16"; or "int8", weights with a scale for each output and inputs with one for
            each token, found while it runs. Sums, norms and the residual stream are float32 in any case.
        tokenizer: for texts; read from the folder if None.
        threads: of each call; torch's if None.
        tier: "portable", "avx2", "avx512", "amx", or "torch" for the same computation without a compiler, in fp32; the
            best of this machine if None and the environment variable SECATEUR_TIER is not set.

    Raises:
        UnsupportedModel: an architecture, a head or an edit that the engine does not run.
        SecateurError: an unknown precision or tier, or one that this machine does not have.
    """
    if precision not in get_args(Precision):
        raise SecateurError(f"A precision is {', '.join(get_args(Precision))}, not {precision!r}.")
    model = open_any(source) if isinstance(source, (str, Path)) else source
    words = tokenizer
    if words is None and isinstance(source, (str, Path)):
        words = source
    if isinstance(words, (str, Path)):
        words = open_tokenizer(words)
    return Engine(plan_of(model), words, precision, threads or torch.get_num_threads(), tier or os.environ.get(TIER))


class Engine:
    """Logits of texts or token ids. Several threads may call one engine at a time.

    Args:
        plan: the encoder and its head.
        tokenizer: for texts.
        precision: of products.
        threads: of each call.
        tier: instructions; the best of this machine if None.
    """

    def __init__(self, plan: Plan, tokenizer: Any, precision: Precision, threads: int, tier: str | None = None) -> None:
        self.plan, self.tokenizer, self.precision, self.threads = plan, tokenizer, precision, threads
        self.encoder = _encoder(plan, precision, tier)

    @torch.inference_mode()
    def __call__(self, batch: Batch) -> Any:
        """Run texts, pairs of texts, or lists of token ids of any lengths.

        Returns:
            Logits (examples, classes) in the order of the batch; for a classifier of tokens a list with (tokens,
            classes) for each example.

        Raises:
            InvalidData: ids out of range, an example without tokens or longer than the model reads, or texts without a
                tokenizer.
        """
        ids, types = self._encoded(batch)
        lengths = [len(row) for row in ids]
        logits = self.encoded(
            torch.tensor([i for row in ids for i in row], dtype=torch.long),
            torch.tensor(lengths, dtype=torch.long),
            torch.tensor([i for row in types for i in row], dtype=torch.long) if types is not None else None,
        )
        return logits if self.plan.head.first else list(logits.split(lengths))

    @torch.inference_mode()
    def encoded(self, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
        """Logits of examples whose tokens lie one behind the other.

        Args:
            ids: (tokens,).
            lengths: (examples,), tokens of each.
            types: (tokens,), token types; 0 if None.

        Returns:
            (examples, classes), or (tokens, classes) of a classifier of tokens.
        """
        starts = functional.pad(lengths.cumsum(0), (1, 0)).int()
        hidden = self.encoder.embed(ids, starts, types, self.threads)
        if (project := self.plan.project) is not None:
            hidden = functional.linear(hidden, project.weight, project.bias)
        self.encoder.run(hidden, starts, self.threads)
        return _head(self.plan.head, hidden[starts[:-1].long()] if self.plan.head.first else hidden)

    def info(self) -> dict[str, Any]:
        """What runs where: tier, precision, threads, bytes of packed weights, layers left."""
        kept = self.plan.layers
        return {
            "tier": self.encoder.tier,
            "precision": self.precision,
            "threads": self.threads,
            "bytes": self.encoder.bytes,
            "layers": [{"heads": layer.heads, "neurons": layer.neurons} for layer in kept],
        }

    def close(self) -> None:
        """Give the memory back; the engine cannot be called any more."""
        self.encoder.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encoded(self, batch: Batch) -> tuple[list[list[int]], list[list[int]] | None]:
        """Ids of each example, and their types where the tokenizer gives some."""
        rows = list(batch)
        if not rows:
            raise InvalidData("There is nothing to run: give at least one text.")
        if isinstance(batch, str):
            raise InvalidData("An engine takes a list of texts: put the text into brackets.")
        if all(isinstance(row, (str, tuple)) for row in rows):
            if self.tokenizer is None:
                raise InvalidData("Texts need a tokenizer: load the engine with tokenizer=, or give token ids.")
            longest = min(self.plan.longest, token_limit(self.tokenizer, None))
            found = self.tokenizer(rows, truncation=True, max_length=longest)
            return found["input_ids"], found.get("token_type_ids") if self.plan.types is not None else None
        ids = [[int(i) for i in row] for row in rows]
        if any(self.plan.padding in row for row in ids):
            raise InvalidData(f"Leave padding ({self.plan.padding}) out: examples have the lengths that they have.")
        return ids, None


def _head(head: Head, hidden: Tensor) -> Tensor:
    for number, each in enumerate(head.maps):
        if number:
            hidden = getattr(functional, head.activation)(hidden)
        hidden = functional.linear(hidden, each.weight, each.bias)
    return hidden


class Encoder(Protocol):
    """Layers of an encoder.

    Attributes:
        tier: what runs them.
        bytes: of their weights.
    """

    tier: str
    bytes: int

    def embed(self, ids: Tensor, starts: Tensor, types: Tensor | None, threads: int) -> Tensor:
        """Embeddings (tokens, width), normalised, of ids that lie one behind the other."""
        ...

    def run(self, hidden: Tensor, starts: Tensor, threads: int) -> None:
        """Embeddings (tokens, hidden) to hidden states, in place; example i has tokens starts[i] to starts[i + 1]."""
        ...

    def close(self) -> None:
        """Give memory back."""
        ...


def _encoder(plan: Plan, precision: Precision, tier: str | None) -> Encoder:
    if tier not in (None, "torch", *TIERS):
        raise SecateurError(f"A tier is {', '.join(TIERS)} or torch, not {tier!r}.")
    if tier == "torch":
        return TorchEncoder(plan)
    try:
        return NativeEncoder(plan, precision, tier)
    except NoCompiler:
        if tier is not None:
            raise
        return TorchEncoder(plan)


def _out_of_range(plan: Plan, what: int) -> InvalidData:
    """What a batch has that the model does not read: 1 an id, 2 an example's length, 3 a token type."""
    if what == 2:
        return InvalidData(f"An example has 1 to {plan.longest} tokens: cut it, or leave empty ones out.")
    name, table = ("Token ids", plan.words) if what == 1 else ("Token types", plan.types)
    return InvalidData(
        f"{name} go from 0 to {len(table) - 1 if table is not None else 0}: is this the model's tokenizer?"
    )


class TorchEncoder:
    """The layers in torch and fp32, maps over all tokens at once: a reference for the native ones."""

    tier = "torch"

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        maps = [m for layer in plan.layers for m in (layer.qkv, layer.out, layer.up, layer.down) if m is not None]
        self.bytes = sum(m.weight.nbytes for m in maps)

    def embed(self, ids: Tensor, starts: Tensor, types: Tensor | None, threads: int) -> Tensor:
        """See `Encoder`."""
        plan, lengths = self.plan, starts.diff()
        for number, (values, least, most) in enumerate(
            (
                (ids, 0, len(plan.words)),
                (lengths, 1, plan.longest + 1),
                (types, 0, 0 if plan.types is None else len(plan.types)),
            ),
            1,
        ):
            if values is not None and len(values) and not (values.min() >= least and values.max() < most):
                raise _out_of_range(plan, number)
        first = starts[:-1].repeat_interleave(lengths)
        found = functional.embedding(ids, plan.words)
        found += functional.embedding(torch.arange(len(ids)) - first + plan.offset, plan.positions)
        if plan.types is not None:
            found += plan.types[0] if types is None else functional.embedding(types, plan.types)
        return functional.layer_norm(found, found.shape[-1:], plan.norm.weight, plan.norm.bias, plan.epsilon)

    def run(self, hidden: Tensor, starts: Tensor, threads: int) -> None:
        """See `Encoder`; threads are torch's."""
        lengths = starts.diff().tolist()
        for layer in self.plan.layers:
            if layer.out is not None and layer.after_attention is not None:
                added = _mapped(self._context(layer, hidden, lengths), layer.out)
                self._settle(hidden, added, layer.after_attention)
            if layer.down is not None and layer.after_feed_forward is not None:
                inner = _mapped(hidden, layer.up) if layer.up is not None else hidden[:, :0]
                self._settle(
                    hidden, _mapped(_activated(inner, self.plan.activation), layer.down), layer.after_feed_forward
                )

    def close(self) -> None:
        """Nothing is held."""

    def _context(self, layer: LayerPlan, hidden: Tensor, lengths: list[int]) -> Tensor:
        if layer.qkv is None:
            return hidden[:, :0]
        qkv = _mapped(hidden, layer.qkv).view(len(hidden), 3, layer.heads, layer.width)
        parts = [part.permute(1, 2, 0, 3) for part in qkv.split(lengths)]
        found = [
            functional.scaled_dot_product_attention(q[None], k[None], v[None], _bias(layer, q.shape[1]))[0]
            for q, k, v in parts
        ]
        return torch.cat([part.transpose(0, 1).flatten(1) for part in found])

    def _settle(self, hidden: Tensor, added: Tensor, norm: Affine) -> None:
        hidden.copy_(
            functional.layer_norm(hidden + added, hidden.shape[-1:], norm.weight, norm.bias, self.plan.epsilon)
        )


def _bias(layer: LayerPlan, tokens: int) -> Tensor | None:
    """What is added to scores, (1, heads, queries, keys)."""
    if layer.relative is None:
        return None
    place = torch.arange(tokens)
    return layer.relative[:, place[None] - place[:, None] + layer.relative.shape[1] // 2][None]


def _mapped(x: Tensor, affine: Affine) -> Tensor:
    return functional.linear(x, affine.weight, affine.bias)


def _activated(x: Tensor, kind: str) -> Tensor:
    return (
        functional.relu(x)
        if kind == "relu"
        else functional.gelu(x, approximate="tanh" if kind == "gelu_tanh" else "none")
    )


# --- the native encoder -------------------------------------------------------------------------------------------


class _Map(ctypes.Structure):
    _fields_ = [
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("out", ctypes.c_int32),
        ("in_", ctypes.c_int32),
    ]


class _Norm(ctypes.Structure):
    _fields_ = [("gain", ctypes.c_void_p), ("shift", ctypes.c_void_p), ("epsilon", ctypes.c_float)]


class _Layer(ctypes.Structure):
    _fields_ = [
        ("heads", ctypes.c_int32),
        ("head_width", ctypes.c_int32),
        ("neurons", ctypes.c_int32),
        ("skip_attention", ctypes.c_int32),
        ("skip_feed_forward", ctypes.c_int32),
        ("scaling", ctypes.c_float),
        ("relative", ctypes.c_void_p),
        *((name, _Map) for name in ("qkv", "out", "up", "down")),
        *((name, _Norm) for name in ("after_attention", "after_feed_forward")),
    ]


class _Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "positions", "types")),
        *((name, ctypes.c_int32) for name in ("vocabulary", "places", "kinds", "width", "offset")),
        ("norm", _Norm),
    ]


class _Config(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int32) for name in ("hidden", "layers", "activation", "precision", "tier", "reach")]


class NativeEncoder:
    """The layers in C++, with weights packed for the instructions of a tier.

    Raises:
        SecateurError: the library cannot be built, or this machine does not have the tier.
    """

    def __init__(self, plan: Plan, precision: Precision, tier: str | None) -> None:
        self._library = library()
        self._lock, self._calls, self._open = threading.Condition(), 0, True
        config = _Config(
            plan.hidden,
            len(plan.layers),
            _ACTIVATIONS[plan.activation],
            get_args(Precision).index(precision),
            -1 if tier is None else TIERS.index(tier),
            next((each.relative.shape[1] // 2 for each in plan.layers if each.relative is not None), 0),
        )
        layers = (_Layer * max(len(plan.layers), 1))(*(_packed(layer, plan.epsilon) for layer in plan.layers))
        why = ctypes.create_string_buffer(200)
        self._handle = ctypes.c_void_p(self._library.sec_open(ctypes.byref(config), layers, why, len(why)))
        if not self._handle:
            best = TIERS[self._library.sec_best_tier()]
            raise SecateurError(
                f"The native engine cannot be made: {why.value.decode()} (the best tier here is {best})."
            )
        types = plan.types
        self._plan = plan  # whose tables are read
        self._tables = _Tables(
            plan.words.data_ptr(),
            plan.positions.data_ptr(),
            None if types is None else types.data_ptr(),
            len(plan.words),
            len(plan.positions),
            0 if types is None else len(types),
            plan.words.shape[1],
            plan.offset,
            _norm(plan.norm, plan.epsilon),
        )
        self.tier = TIERS[self._library.sec_tier(self._handle)]
        self.bytes = int(self._library.sec_bytes(self._handle))

    def embed(self, ids: Tensor, starts: Tensor, types: Tensor | None, threads: int) -> Tensor:
        """See `Encoder`."""
        found = torch.empty(len(ids), self._tables.width)
        with self._call():
            wrong = self._library.sec_embed(
                self._handle,
                ctypes.byref(self._tables),
                _pointer(ids),
                _pointer(types),
                _pointer(starts),
                len(starts) - 1,
                _pointer(found),
                threads,
            )
        if wrong:
            raise _out_of_range(self._plan, wrong)
        return found

    def run(self, hidden: Tensor, starts: Tensor, threads: int) -> None:
        """See `Encoder`."""
        with self._call():
            failed = self._library.sec_run(
                self._handle, _pointer(hidden), _pointer(starts), len(starts) - 1, max(1, threads)
            )
        if failed:
            raise SecateurError("There is not enough memory for this batch: give fewer examples at a time.")

    @contextmanager
    def _call(self) -> Iterator[None]:
        """Within the context the engine stays open."""
        with self._lock:
            if not self._open:
                raise SecateurError("The engine is closed: load it again.")
            self._calls += 1
        try:
            yield
        finally:
            with self._lock:
                self._calls -= 1
                self._lock.notify_all()

    def close(self) -> None:
        """Give the packed weights back, once no call is under way."""
        with self._lock:
            self._lock.wait_for(lambda: self._calls == 0)
            if self._open:
                self._open = False
                self._library.sec_close(self._handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) and self._open:
            self.close()


def _pointer(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _packed(layer: LayerPlan, epsilon: float) -> _Layer:
    width = layer.width
    return _Layer(
        layer.heads,
        width,
        layer.neurons,
        int(layer.out is None),
        int(layer.down is None),
        width**-0.5 if width else 0.0,
        None if layer.relative is None else layer.relative.data_ptr(),
        *(_map(each) for each in (layer.qkv, layer.out, layer.up, layer.down)),
        *(_norm(each, epsilon) for each in (layer.after_attention, layer.after_feed_forward)),
    )


def _map(affine: Affine | None) -> _Map:
    if affine is None:
        return _Map()
    out, inner = affine.weight.shape
    return _Map(affine.weight.data_ptr(), None if affine.bias is None else affine.bias.data_ptr(), out, inner)


def _norm(affine: Affine | None, epsilon: float) -> _Norm:
    if affine is None or affine.bias is None:
        return _Norm()
    return _Norm(affine.weight.data_ptr(), affine.bias.data_ptr(), epsilon)
