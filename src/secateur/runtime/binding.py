"""The layers of an encoder in C++, by ctypes."""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from secateur.errors import InvalidData, SecateurError
from secateur.runtime.binary import BinaryAffine, Rounding
from secateur.runtime.build import TIERS, library
from secateur.runtime.encoder import mapped, out_of_range
from secateur.runtime.plan import Affine, LayerPlan, LinearMap, Plan

Precision = Literal["fp32", "bf16", "int8", "1bit"]
_SHORT = "There is not enough memory for this batch: give fewer examples at a time."
_WORD_BITS = {torch.float32: 32, torch.int8: 8, torch.int64: 1}
_ACTIVATIONS = {"gelu": 1, "relu": 2, "gelu_tanh": 3}


class _Levels(ctypes.Structure):
    _fields_ = [
        ("shift", ctypes.c_void_p),
        ("alpha", ctypes.c_float),
        *((name, ctypes.c_int32) for name in ("low", "high", "sign")),
    ]


class _Map(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "signs", "scale")),
        ("levels", _Levels),
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
        *((name, ctypes.c_int32) for name in ("split", "rounded")),
        ("parts", _Map * 3),
        ("operands", _Levels * 3),
        ("probabilities", _Levels),
        *((name, ctypes.c_float) for name in ("scores", "context")),
        *((name, _Norm) for name in ("before_attention", "before_feed_forward")),
        ("gate", _Map),
        ("rotary", ctypes.c_void_p),
        ("window", ctypes.c_int32),
    ]


class _Tables(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("words", "positions", "types", "word_scale")),
        ("word_bits", ctypes.c_int32),
        *((name, ctypes.c_int32) for name in ("vocabulary", "places", "kinds", "width", "offset")),
        ("norm", _Norm),
    ]


class _Config(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int32) for name in ("hidden", "layers", "activation", "precision", "tier", "reach")),
        ("last", _Norm),
    ]


class _Dropping(ctypes.Structure):
    _fields_ = [
        ("shares", ctypes.POINTER(ctypes.c_double)),
        *((name, ctypes.c_int32) for name in ("first", "last", "queries", "by_value", "diagonal")),
        ("beta", ctypes.c_float),
        ("every", ctypes.c_int32),
    ]


_ENCODERS: weakref.WeakSet[NativeEncoder] = weakref.WeakSet()


def _forget_calls() -> None:
    for each in _ENCODERS:
        each.forget_calls()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_calls)


class NativeEncoder:
    """The layers in C++, with weights packed for the instructions of a tier.

    Raises:
        SecateurError: the library cannot be built, or this machine does not have the tier.
    """

    def __init__(self, plan: Plan, precision: Precision, tier: str | None) -> None:
        self._library = library()
        self._lock, self._calls, self._open = threading.Condition(), 0, True
        _ENCODERS.add(self)
        config = _Config(
            plan.hidden,
            len(plan.layers),
            _ACTIVATIONS[plan.activation],
            get_args(Precision).index("fp32" if plan.binary else precision),
            -1 if tier is None else TIERS.index(tier),
            next((each.relative.shape[1] // 2 for each in plan.layers if each.relative is not None), 0),
            _norm(plan.last, plan.epsilon),
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
        self._plan = replace(plan, layers=())  # whose tables are read; the layers are packed
        attending = [number for number, each in enumerate(plan.layers) if each.out is not None and each.heads]
        self._layers, self._last_attending = len(plan.layers), max(attending, default=0)
        self._rotary = [layer.rotary for layer in plan.layers]  # but for these, which are read too
        self._tables = _Tables(
            plan.words.values.data_ptr(),
            None if plan.positions is None else plan.positions.data_ptr(),
            None if types is None else types.data_ptr(),
            None if plan.words.scale is None else plan.words.scale.data_ptr(),
            _WORD_BITS[plan.words.values.dtype],
            len(plan.words),
            plan.longest + plan.offset,
            0 if types is None else len(types),
            plan.words.width,
            plan.offset,
            _norm(plan.norm, plan.epsilon),
        )
        self._beside: dict[int, int] = {}  # number of the packed map, by the plan's
        for each in (plan.project, *plan.head.maps):
            if isinstance(each, Affine):
                number = self._library.sec_add(self._handle, ctypes.byref(_map(each)))
                if number < 0:
                    raise SecateurError("There is not enough memory for this model.")
                self._beside[id(each)] = number
        self.tier = TIERS[self._library.sec_tier(self._handle)]
        self.bytes = int(self._library.sec_bytes(self._handle))
        counts = (ctypes.c_int64 * 4)()
        self._library.sec_storage(self._handle, counts)
        maps, masked, blocks, all_blocks = counts
        self.storage = {"maps": maps, "masked": masked, "blocks": blocks / max(all_blocks, 1)}

    def run(self, ids: Tensor, starts: Tensor, types: Tensor | None, threads: int, alpha: float = 0.0) -> Tensor:
        """See `Encoder`."""
        given = len(starts) - 1, threads
        found = torch.empty(len(ids), self._tables.width)
        places = _pointer(starts, torch.int32)
        tables, pointers = ctypes.byref(self._tables), (_pointer(ids), _pointer(types), places)
        wrong = self._library.sec_embed(self._handle, tables, *pointers, given[0], _floats(found), given[1])
        if wrong == 4:
            raise SecateurError(_SHORT)
        if wrong:
            raise out_of_range(self._plan, wrong)
        if self._plan.project is not None:
            found = self.mapped(found, self._plan.project, threads)
        if self._library.sec_run(self._handle, _floats(found), places, *given, self._dropping(alpha)):
            raise SecateurError(_SHORT)
        return found

    def mapped(self, x: Tensor, affine: LinearMap, threads: int) -> Tensor:
        """See `Encoder`. torch would leave threads behind that look out for work, on cores that the next call needs."""
        number = self._beside.get(id(affine))
        if number is None or isinstance(affine, BinaryAffine):
            return mapped(x, affine)
        x, found = x.contiguous(), x.new_empty(len(x), len(affine.weight))
        if self._library.sec_apply(self._handle, number, _floats(x), len(x), _floats(found), threads):
            raise SecateurError(_SHORT)
        return found

    def _dropping(self, alpha: float) -> Any:
        """How tokens go at a setting of the dial; null where all stay.

        Of a head that reads first tokens, others go as soon as no attention looks at them any more, at any setting.
        """
        plan, every = self._plan, not self._plan.head.first or self._plan.head.mean
        turned = plan.dropping is not None and alpha > 0
        if every and not turned:
            return ctypes.c_void_p(None)
        kept, how = [1.0] * self._layers, (1, 0, 0, 0, 0, 0.0)
        if plan.dropping is not None and turned:
            edit = plan.dropping.edit
            kept, weighted = list(edit.shares(alpha)), edit.weighting == "value"
            how = (edit.protected, edit.recent, edit.queries, int(weighted), int(edit.diagonal), edit.beta)
        if not every:
            kept[self._last_attending :] = [0.0] * (self._layers - self._last_attending)
        return ctypes.byref(_Dropping((ctypes.c_double * len(kept))(*kept), *how, int(every)))

    @contextmanager
    def call(self) -> Iterator[None]:
        """See `Encoder`."""
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
        """Take no more calls, and give the packed weights back once none is under way."""
        with self._lock:
            if not self._open:
                return
            self._open = False
            self._lock.wait_for(lambda: self._calls <= 0)
        self._library.sec_close(self._handle)

    def __del__(self) -> None:
        if getattr(self, "_handle", None) and self._open:
            self.close()

    def forget_calls(self) -> None:
        """In a process that was forked: calls of threads that it does not have never end."""
        self._lock, self._calls = threading.Condition(), 0


def _pointer(tensor: Tensor | None, dtype: torch.dtype = torch.int64) -> ctypes.c_void_p:
    """Where a tensor's values lie one behind the other."""
    if tensor is None:
        return ctypes.c_void_p(None)
    if tensor.dtype != dtype or not tensor.is_contiguous() or tensor.device.type != "cpu":
        raise InvalidData(f"The engine reads contiguous {dtype} on the CPU, not {tensor.dtype} on {tensor.device}.")
    return ctypes.c_void_p(tensor.data_ptr())


def _floats(tensor: Tensor) -> ctypes.c_void_p:
    return _pointer(tensor, torch.float32)


def _packed(layer: LayerPlan, epsilon: float) -> _Layer:
    width, levels = layer.width, layer.levels
    operands = () if levels is None else (levels.query, levels.key, levels.value)
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
        int(bool(layer.parts)),
        int(levels is not None),
        (_Map * 3)(*map(_map, layer.parts)),
        (_Levels * 3)(*map(_levels, operands)),
        *((_Levels(), 0.0, 0.0) if levels is None else (_levels(levels.probs), levels.factor(width), levels.context)),
        *(_norm(each, epsilon) for each in (layer.before_attention, layer.before_feed_forward)),
        _map(layer.gate),
        None if layer.rotary is None else layer.rotary.data_ptr(),
        -1 if layer.window is None else layer.window,
    )


def _map(affine: LinearMap | None) -> _Map:
    if affine is None:
        return _Map()
    bias = None if affine.bias is None else affine.bias.data_ptr()
    if isinstance(affine, BinaryAffine):
        signs, scale = affine.words.data_ptr(), affine.scale.data_ptr()
        return _Map(None, bias, signs, scale, _levels(affine.rounding), *affine.shape)
    return _Map(affine.weight.data_ptr(), bias, None, None, _Levels(), *affine.weight.shape)


def _levels(rounding: Rounding) -> _Levels:
    levels, shift = rounding.levels, rounding.shift
    pointer = None if shift is None else shift.data_ptr()
    return _Levels(pointer, float(rounding.alpha), levels.lowest, levels.highest, int(levels.is_sign))


def _norm(affine: Affine | None, epsilon: float) -> _Norm:
    if affine is None or affine.bias is None:
        return _Norm()
    return _Norm(affine.weight.data_ptr(), affine.bias.data_ptr(), epsilon)
