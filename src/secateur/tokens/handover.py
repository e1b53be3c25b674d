"""Elimination in a live model: hooks that shorten the hidden states between the layers, and give them back whole.

No forward pass of a family is copied. The hooks do nothing, and cost next to nothing, while the dial stands at 1.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from secateur.errors import InvalidData, UnsupportedModel
from secateur.families import FAMILIES, Sites, sites
from secateur.tokens.attention import asked, eliminating, with_attention
from secateur.tokens.specs import TOKEN_SPECS, Carried, TokenSpec
from secateur.tokens.state import CURRENT, Continuation, Pass


class Beginner(Protocol):
    """What decides about a forward pass: the dial."""

    @property
    def active(self) -> bool:
        """Whether tokens are eliminated or watched; else the model runs as if nothing was installed."""
        ...

    def begin(self, real: Tensor) -> Pass:
        """Return the pass to run, given the real tokens of a batch, (batch, tokens)."""
        ...


CACHED = "secateur_cached"
"""Attribute of a key-value cache: which keys of each layer are real, (batch, keys)."""


def token_spec(found: Sites) -> TokenSpec:
    """How a model hands tokens on.

    Raises:
        UnsupportedModel: a family whose tokens cannot be eliminated.
    """
    spec = TOKEN_SPECS.get(found.family.name)
    if spec is None:
        raise UnsupportedModel(
            f"Tokens of '{found.family.name}' models cannot be eliminated: use one of {', '.join(TOKEN_SPECS)}."
        )
    return spec


def packs(model: nn.Module) -> bool:
    """Whether a model's attention can run without padding (it goes through transformers' attention interface)."""
    spec = token_spec(sites(model))
    return not spec.probabilities and not spec.causal


def is_causal(model: nn.Module) -> bool:
    """Whether a model is a decoder, whose prompt's tokens are eliminated."""
    return token_spec(sites(model)).causal


def install(model: nn.Module, beginner: Beginner) -> None:
    """Put the hooks into a model, in place.

    Args:
        model: an encoder of a family in `TOKEN_SPECS`.
        beginner: asked at the start of each forward pass.

    Raises:
        UnsupportedModel: a family, or a variant of one, whose tokens cannot be eliminated.
    """
    found = sites(model)
    spec = token_spec(found)
    base = getattr(model, "base_model", model)
    _check_variant(model, base, spec)
    base.register_forward_pre_hook(_Enter(base, beginner), with_kwargs=True)
    base.register_forward_hook(_Leave(), always_call=True)
    layers = list(base.get_submodule(FAMILIES[found.family.name].stacks[0].layers).children())
    heads = {site.layer: site for site in found.heads}
    for index, layer in enumerate(layers):
        attention = heads[index].module
        if spec.probabilities:
            layer.get_submodule(spec.values).register_forward_hook(_Values())
            layer.get_submodule(spec.probabilities).register_forward_pre_hook(_Watch(attention))
        else:
            attention.config = with_attention(attention.config, eliminating)
        layer.register_forward_pre_hook(_Begin(layer, index, spec, attention), with_kwargs=True)
        if spec.residual:
            layer.get_submodule(spec.residual).register_forward_hook(_Shorten())
        else:
            layer.get_submodule(spec.ffn_norm).register_forward_hook(_ShortenNorm())
            layer.get_submodule(spec.ffn).register_forward_hook(_Spread())
            layer.register_forward_hook(_ShortenLayer())
    layers[-1].register_forward_hook(_End())


def _check_variant(model: nn.Module, base: nn.Module, spec: TokenSpec) -> None:
    config: Any = model.config
    if getattr(config, "add_cross_attention", False) or (getattr(config, "is_decoder", False) and not spec.causal):
        raise UnsupportedModel(
            f"A '{config.model_type}' model as a decoder hands on no tokens: set is_decoder and add_cross_attention "
            "to False in its config."
        )
    if getattr(getattr(base, "encoder", None), "conv", None) is not None:
        raise UnsupportedModel(
            "This DeBERTa mixes neighbouring tokens by a convolution (conv_kernel_size > 0): its tokens cannot go."
        )


def _parameters(module: nn.Module) -> list[str]:
    """Names of the arguments of a module's forward pass, in order."""
    return list(inspect.signature(type(module).forward).parameters)[1:]


def _named(names: list[str], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call by name."""
    return dict(zip(names, args, strict=False)) | kwargs


class _Enter:
    """Before the model: begin a pass."""

    def __init__(self, base: nn.Module, beginner: Beginner) -> None:
        self.names = _parameters(base)
        self.beginner = beginner

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        CURRENT.set(None)
        given = _named(self.names, args, kwargs)
        cached = _continued(given.get("past_key_values"))
        if cached is None and not self.beginner.active:
            return
        mask, inputs = given.get("attention_mask"), given.get("input_ids")
        inputs = given.get("inputs_embeds") if inputs is None else inputs
        if inputs is None:
            return  # the model's own error is clearer
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise InvalidData("Token elimination reads an attention_mask of shape (batch, tokens).")
        for name in ("output_hidden_states", "output_attentions"):
            asked = given.get(name)
            if getattr(module.config, name, False) if asked is None else asked:
                raise InvalidData(f"{name} with tokens eliminated: each layer has another length. Turn the dial to 1.")
        cache = given.get("past_key_values")
        if cached is not None:
            CURRENT.set(Continuation(inputs.shape[0], inputs.shape[1], cached))
        elif cache is None or cache.get_seq_length() == 0:  # else a dense prompt goes on densely
            real = inputs.new_ones(inputs.shape[:2], dtype=torch.bool) if mask is None else mask.bool()
            CURRENT.set(self.beginner.begin(real))


def _continued(cache: Any) -> list[Tensor] | None:
    """The real keys of each layer of a cache that holds an eliminated prompt."""
    return None if cache is None or cache.get_seq_length() == 0 else getattr(cache, CACHED, None)


class _Leave:
    """After the model, also after an error: the pass is over."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        CURRENT.set(None)


class _Begin:
    """Before a layer: hidden states in the layout's form, and everything else cut along with them."""

    def __init__(self, layer: nn.Module, index: int, spec: TokenSpec, attention: nn.Module) -> None:
        self.names = _parameters(layer)
        self.index = index
        self.spec = spec
        self.attention = attention

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        now = CURRENT.get()
        if now is None:
            return None
        given = _named(self.names, args, kwargs)
        if self.index == 0:
            given["hidden_states"] = now.begin(given["hidden_states"])
            if self.spec.causal and given.get("past_key_values") is not None and not isinstance(now, Continuation):
                setattr(given["past_key_values"], CACHED, now.cached)
        now.enter(self.index)
        for name, kind in self.spec.carried:
            if given.get(name) is not None:
                given[name] = _CUT[kind](given[name], now, self.attention)
        given["attention_mask"] = _padding_mask(self.spec, now, given["hidden_states"])
        # the hidden states stay an argument by position, which is where transformers' own hooks look for them
        return (given.pop("hidden_states"),), given


class _Values:
    """After the values are made: keep them for the score."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        now = CURRENT.get()
        if now is not None and now.scoring:
            now.values = output


class _Watch:
    """Before the dropout on attention's probabilities: score the tokens."""

    def __init__(self, attention: nn.Module) -> None:
        self.attention = attention

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        now = CURRENT.get()
        if now is None or not now.scoring:
            return
        probabilities, values, bits = args[0], now.values, getattr(self.attention, "attention_bits", None)
        if values is not None:
            values = values.unflatten(-1, (probabilities.shape[1], -1)).transpose(1, 2)
            if bits is not None:
                probabilities, values = bits.supplied(probabilities, values)
        probabilities, places = asked(probabilities, now.layout.valid, now.selection.queries)
        now.observe(now.score(probabilities, now.layout.valid, values, places))
        now.values = None


class _Shorten:
    """After attention (post-norm): only the chosen tokens go on."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = CURRENT.get()
        if now is None:
            return None
        now.choose()
        return _first(output, now.shorten)


class _ShortenNorm:
    """After the norm before a pre-norm feed-forward block: the block reads the chosen tokens only."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        now = CURRENT.get()
        if now is None:
            return None
        now.choose()
        return now.shorten(output, last=False)


class _Spread:
    """After a pre-norm feed-forward block: its output back at the places of the residual stream."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        now = CURRENT.get()
        return None if now is None else now.spread(output)


class _ShortenLayer:
    """After a pre-norm layer: the residual stream of the chosen tokens."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = CURRENT.get()
        return None if now is None else _first(output, now.shorten)


class _End:
    """After the last layer: every token at its place again."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        now = CURRENT.get()
        return None if now is None else _first(output, now.restore)


def _first(output: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Change the hidden states that a module returns, alone or first in a tuple."""
    return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)


def _padding_mask(spec: TokenSpec, now: Pass, hidden: Tensor) -> Tensor | None:
    """The attention mask that a layer gets: none where our attention makes its own."""
    if not spec.probabilities:
        return None
    valid = now.layout.valid
    if ("relative_pos", "pair_index") in spec.carried:  # DeBERTa multiplies queries and keys
        return valid[:, None, None, :] & valid[:, None, :, None]
    return torch.zeros_like(valid, dtype=hidden.dtype).masked_fill(~valid, torch.finfo(hidden.dtype).min)[:, None, None]


def _cut_rotary(value: tuple[Tensor, Tensor], now: Pass, attention: nn.Module) -> tuple[Tensor, Tensor]:
    def pick(table: Tensor) -> Tensor:
        slots = now.layout.slots
        full = table.expand(slots.shape[0], -1, -1)
        padded = full.gather(1, slots[..., None].expand(*slots.shape, table.shape[-1]))
        return now.layout.pack(padded)[None] if now.layout.packed else padded

    return pick(value[0]), pick(value[1])


def _cut_pair_bias(value: Tensor, now: Pass, attention: nn.Module) -> Tensor:
    """(1 or batch, heads, n, n) → (batch, heads, width, width)."""
    slots = now.layout.slots
    batch, width = slots.shape
    rows = value.expand(batch, -1, -1, -1).gather(
        2, slots[:, None, :, None].expand(-1, value.shape[1], -1, value.shape[3])
    )
    return rows.gather(3, slots[:, None, None, :].expand(-1, value.shape[1], width, -1))


def _cut_pair_index(value: Tensor, now: Pass, attention: nn.Module) -> Tensor:
    """(1, n, n) → (1, batch × heads, width, width): DeBERTa takes a matrix for each example only in this form."""
    slots = now.layout.slots
    index = value[0][slots[:, :, None], slots[:, None, :]]
    return index.repeat_interleave(int(attention.num_attention_heads), dim=0)[None]  # type: ignore[arg-type]


_CUT: dict[Carried, Callable[[Any, Pass, nn.Module], Any]] = {
    "rotary": _cut_rotary,
    "pair_bias": _cut_pair_bias,
    "pair_index": _cut_pair_index,
}
