"""An engine: an encoder folder for inference alone, on ragged batches without padding."""

from __future__ import annotations

import operator
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from secateur.costs.tokens import FASTEST
from secateur.errors import InvalidData, SecateurError
from secateur.hub import open_any, open_tokenizer
from secateur.runtime.binding import NativeEncoder, Precision
from secateur.runtime.build import TIERS, CannotBuild
from secateur.runtime.encoder import Encoder, TorchEncoder, out_of_range
from secateur.runtime.op import EngineModule
from secateur.runtime.plan import Head, Plan, plan_of
from secateur.tasks.batching import token_limit

TIER = "SECATEUR_TIER"
"""Environment variable that forces a tier of instructions, or "torch"."""

MOST_THREADS = 256

Text = str | tuple[str, str]
Batch = Sequence[Text] | Sequence[Sequence[int]]


def load(
    source: str | Path | PreTrainedModel,
    precision: Precision | None = None,
    *,
    tokenizer: str | Path | PreTrainedTokenizerBase | None = None,
    threads: int | None = None,
    tier: str | None = None,
) -> Engine:
    """Make an engine of a classifier.

    Args:
        source: a folder, a hub id, or a live model.
        precision: of products: "fp32"; "bf16"; or "int8", the default, weights with a scale for each output and inputs
            with one for each token, found while it runs. Sums, norms and the residual stream are float32 in any case. A
            binary model runs on the bits that it has, "1bit", and on nothing else.
        tokenizer: for texts; read from the folder if None.
        threads: of each call; torch's if None.
        tier: "portable", "avx2", "avx512", "amx", or "torch" for the same computation without a compiler, in fp32; the
            best of this machine if None and the environment variable SECATEUR_TIER is not set.

    Raises:
        UnsupportedModel: an architecture or a head that the engine does not run.
        InvalidModel: a folder whose weights are damaged, or do not fill the model that its config describes.
        SecateurError: an unknown precision or tier, or one that this machine does not have.
    """
    if precision not in (None, *get_args(Precision)):
        raise SecateurError(f"A precision is {', '.join(get_args(Precision))}, not {precision!r}.")
    model = open_any(source, trained=True) if isinstance(source, (str, Path)) else source
    words = tokenizer
    if words is None and isinstance(source, (str, Path)):
        words = source
    if isinstance(words, (str, Path)):
        words = open_tokenizer(words)
    plan = plan_of(model)
    if precision is not None and plan.binary != (precision == "1bit"):
        what = "is binary and runs on the bits that it has" if plan.binary else "is not binary"
        raise SecateurError(f"This model {what}: precision={precision!r} is not for it, leave it out.")
    found = precision or ("1bit" if plan.binary else "int8")
    return Engine(
        plan, words, found, threads or min(torch.get_num_threads(), MOST_THREADS), tier or os.environ.get(TIER)
    )


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
        self.tokenizer, self.threads = tokenizer, threads
        self.layers = [{"heads": layer.heads, "neurons": layer.neurons} for layer in plan.layers]
        self.encoder, plan = _encoder(plan, precision, tier)
        self.precision = precision if self.encoder.tier != "torch" or plan.binary else "fp32"
        self._plan: Plan | None = replace(plan, layers=())
        self._alpha = plan.dropping.edit.alpha if plan.dropping is not None else 0.0

    @property
    def threads(self) -> int:
        """Threads of each call."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        if type(count) is not int or not 1 <= count <= MOST_THREADS:
            raise SecateurError(f"Threads are a whole number from 1 to {MOST_THREADS}, not {count!r}.")
        self._threads = count

    @property
    def speedup(self) -> float:
        """MACs of the dense layers over those with tokens eliminated, at the dial's length; 1 without a dial.

        It may be set between calls, by any thread: each call runs at the setting that it found.
        """
        dropping = self.plan.dropping
        return 1.0 if dropping is None else dropping.edit.speedup(dropping.costs, self._alpha)

    @speedup.setter
    def speedup(self, value: float) -> None:
        dropping = self.plan.dropping
        if dropping is None:
            raise SecateurError("This model has no dial: compress it with the method 'late' first.")
        self._alpha = dropping.edit.alpha_for(dropping.costs, value)

    @property
    def reach(self) -> float:
        """The largest speed-up; 1 without a dial."""
        dropping = self.plan.dropping
        return 1.0 if dropping is None else dropping.edit.speedup(dropping.costs, FASTEST)

    @property
    def plan(self) -> Plan:
        """Tables, head and sizes; the layers are packed.

        Raises:
            SecateurError: the engine is closed.
        """
        if self._plan is None:
            raise SecateurError("The engine is closed: load it again.")
        return self._plan

    def __call__(self, batch: Batch) -> Any:
        """Run texts, pairs of texts, or lists of token ids of any lengths.

        Returns:
            Logits (examples, classes) in the order of the batch; for a classifier of tokens a list with (tokens,
            classes) for each example.

        Raises:
            InvalidData: what is no list of texts or ids, ids out of range, padding, an example without tokens or longer
                than the model reads, or texts without a tokenizer.
        """
        first = self.plan.head.first
        ids, types = self._encoded(batch)
        lengths = [len(row) for row in ids]
        logits = self.encoded(
            torch.tensor([i for row in ids for i in row], dtype=torch.long),
            torch.tensor(lengths, dtype=torch.long),
            torch.tensor([i for row in types for i in row], dtype=torch.long) if types is not None else None,
        )
        return logits if first else list(logits.split(lengths))

    @torch.no_grad()
    def encoded(self, ids: Tensor, lengths: Tensor, types: Tensor | None = None) -> Tensor:
        """Logits of examples whose tokens lie one behind the other.

        Args:
            ids: (tokens,).
            lengths: (examples,), tokens of each.
            types: (tokens,), token types; 0 if None.

        Returns:
            (examples, classes), or (tokens, classes) of a classifier of tokens.

        Raises:
            InvalidData: ids, lengths or types that do not fit each other or the model.
        """
        plan = self.plan
        ids, lengths = _whole(ids), _whole(lengths)
        types = None if types is None or plan.types is None else _whole(types)
        if int(lengths.sum()) != len(ids) or (types is not None and len(types) != len(ids)) or not len(lengths):
            raise InvalidData(f"{len(ids)} ids do not fit lengths that add up to {int(lengths.sum())}, or their types.")
        if int(lengths.min()) < 1 or int(lengths.max()) > plan.longest:
            raise out_of_range(plan, 2)
        starts = functional.pad(lengths.cumsum(0), (1, 0)).int()
        with self.encoder.call():
            hidden = self.encoder.run(ids, starts, types, self.threads, self._alpha)
            return self._logits(plan, _read(plan.head, hidden, starts))

    def _logits(self, plan: Plan, hidden: Tensor) -> Tensor:
        """What the head makes of the states that it reads."""
        head = plan.head
        for number, each in enumerate(head.maps):
            if number:
                hidden = _activated(hidden, head.activation)
                if head.norm is not None:
                    hidden = functional.layer_norm(
                        hidden, hidden.shape[-1:], head.norm.weight, head.norm.bias, plan.epsilon
                    )
            hidden = self.encoder.mapped(hidden, each, self.threads)
        return hidden

    def module(self) -> EngineModule:
        """A module whose forward(ids, lengths, types=None) is `encoded`: one operator, kept whole by `torch.compile`.

        Compiled code calls the engine as it is: threads and speed-up may still be set between calls.
        """
        return EngineModule(self)

    def info(self) -> dict[str, Any]:
        """What runs where: tier, precision, threads, speed-up, bytes, layers, zeros left out (`Encoder.storage`)."""
        plan = self.plan
        tables = [table for table in (plan.words, plan.positions, plan.types) if table is not None]
        return {
            "tier": self.encoder.tier,
            "precision": self.precision,
            "threads": self.threads,
            "speedup": self.speedup,
            "bytes": self.encoder.bytes,
            "table_bytes": sum(table.nbytes for table in tables),
            "layers": self.layers,
            "storage": self.encoder.storage,
        }

    def close(self) -> None:
        """Give the memory back; the engine cannot be called any more."""
        self.encoder.close()
        self._plan = None

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _encoded(self, batch: Batch) -> tuple[list[list[int]], list[list[int]] | None]:
        """Ids of each example, and their types where the tokenizer gives some."""
        if isinstance(batch, str) or not isinstance(
            batch, (Sequence, Tensor)
        ):  # also what a tokenizer gives, a mapping
            raise InvalidData(
                "An engine takes a list of texts, of pairs of texts or of lists of ids: put a text into brackets, give "
                "tokenizer(texts)['input_ids'] without padding."
            )
        rows = list(batch)
        if not rows:
            raise InvalidData("There is nothing to run: give at least one text.")
        if all(isinstance(row, str) or (isinstance(row, (tuple, list)) and _is_pair(row)) for row in rows):
            if self.tokenizer is None:
                raise InvalidData("Texts need a tokenizer: load the engine with tokenizer=, or give token ids.")
            longest = min(self.plan.longest, token_limit(self.tokenizer, None))
            texts = [row if isinstance(row, str) else tuple(row) for row in rows]
            found = self.tokenizer(texts, truncation=True, max_length=longest)
            return found["input_ids"], found.get("token_type_ids")
        try:
            ids = [[operator.index(cast(Any, i)) for i in row] for row in rows]
        except TypeError:
            raise InvalidData("Examples are all texts or pairs of texts, or all lists of token ids.") from None
        if any(self.plan.padding in row for row in ids):
            raise InvalidData(f"Leave padding ({self.plan.padding}) out: examples have the lengths that they have.")
        return ids, None


def _is_pair(row: Sequence[Any]) -> bool:
    return len(row) == 2 and all(isinstance(text, str) for text in row)


def _whole(values: Tensor) -> Tensor:
    """Whole numbers as the engine reads them."""
    if values.is_floating_point() or values.dim() != 1:
        raise InvalidData(
            f"Ids, lengths and types are whole numbers in one row, not {values.dtype} {tuple(values.shape)}."
        )
    return values.to("cpu", torch.long).contiguous()


def _read(head: Head, hidden: Tensor, starts: Tensor) -> Tensor:
    """The states that a head reads."""
    if head.mean:
        return torch.stack([part.mean(0) for part in hidden.split(starts.diff().tolist())])
    return hidden[starts[:-1].long()] if head.first else hidden


def _activated(x: Tensor, kind: str) -> Tensor:
    """Results of an activation. That of torch wakes threads for one row's tanh, which keep cores from the next call."""
    return torch.from_numpy(np.tanh(x.numpy())) if kind == "tanh" else getattr(functional, kind)(x)


def _encoder(plan: Plan, precision: Precision, tier: str | None) -> tuple[Encoder, Plan]:
    """What runs the layers, and the plan whose tables it reads."""
    if tier not in (None, "torch", *TIERS):
        raise SecateurError(f"A tier is {', '.join(TIERS)} or torch, not {tier!r}.")
    if tier == "torch":
        return TorchEncoder(plan), plan
    small = replace(plan, words=plan.words.rounded()) if precision == "int8" else plan
    try:
        return NativeEncoder(small, precision, tier), small
    except CannotBuild as error:
        if tier is not None:
            raise
        warnings.warn(f"{error} Until then torch computes, in fp32.", stacklevel=3)
        return TorchEncoder(plan), plan
